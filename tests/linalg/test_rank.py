import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    Form,
    break_even_rank,
    dense_parameters,
    energy_rank,
    ratio_rank,
    round_rank_down,
    round_rank_up,
    stored_parameters,
)

SIDES = st.integers(1, 20_000)
FORMS = st.sampled_from(Form)


@given(FORMS, st.integers(1, 30), st.integers(1, 30), st.booleans(), st.data())
def test_stored_parameters_are_the_entries_of_the_factors(form, m, n, bias, data):
    r = data.draw(st.integers(1, min(m, n)))
    shapes = {
        Form.CUR: [(m, r), (r, r), (r, n)],
        Form.ID: [(r, n), (m - r, r)],
    }
    expected = sum(rows * columns for rows, columns in shapes[form]) + m * bias
    assert stored_parameters(form, m, n, r, bias=bias) == expected
    assert dense_parameters(m, n, bias=bias) == m * n + m * bias


@given(FORMS, SIDES, SIDES, st.floats(0, 1, exclude_min=True), st.booleans())
def test_ratio_rank_is_the_largest_within_budget(form, m, n, ratio, bias):
    rank = ratio_rank(form, m, n, ratio, bias=bias)
    budget = ratio * dense_parameters(m, n, bias=bias)
    assert 0 <= rank <= min(m, n)
    if rank:
        assert stored_parameters(form, m, n, rank, bias=bias) <= budget
    if rank < min(m, n):
        assert stored_parameters(form, m, n, rank + 1, bias=bias) > budget


@given(FORMS, SIDES, SIDES, st.booleans())
def test_break_even_rank_is_the_last_that_saves_anything(form, m, n, bias):
    rank = break_even_rank(form, m, n, bias=bias)
    dense = dense_parameters(m, n, bias=bias)
    assert rank == 0 or stored_parameters(form, m, n, rank, bias=bias) < dense
    if rank < min(m, n):
        assert stored_parameters(form, m, n, rank + 1, bias=bias) >= dense


@given(SIDES, SIDES)
def test_break_even_rank_of_cur_is_curing_s_closed_form(m, n):
    # ⌈(√D − s)/2⌉ − 1 in integers: the largest r with 2r + s < √D.
    s, discriminant = m + n, m * m + 6 * m * n + n * n
    expected = (math.isqrt(discriminant - 1) - s) // 2
    assert break_even_rank(Form.CUR, m, n) == expected
    floating = math.ceil((math.sqrt(discriminant) - s) / 2) - 1
    assert abs(expected - floating) <= (math.isqrt(discriminant) ** 2 == discriminant)


@pytest.mark.parametrize(
    ("ratio", "as_id", "as_cur"), [(0.8, 2264, 1399), (0.6, 1505, 1085), (0.5, 1199, 920)]
)
def test_known_ranks(ratio, as_id, as_cur):
    assert ratio_rank(Form.ID, 4096, 4096, ratio) == as_id
    assert ratio_rank(Form.CUR, 4096, 4096, ratio) == as_cur


@given(st.integers(1, 40), st.floats(0, 1, exclude_min=True), st.floats(0, 4))
def test_energy_rank_is_the_smallest_that_holds_the_energy(length, energy, decay):
    spectrum = torch.arange(1, length + 1).double() ** -decay
    rank = energy_rank(spectrum, energy)
    squares = spectrum.square()
    held = squares.cumsum(0) / squares.sum()
    assert 1 <= rank <= length
    assert held[rank - 1] >= energy - 1e-9
    assert rank == 1 or held[rank - 2] < energy


def test_energy_rank_at_the_ends():
    assert energy_rank(torch.tensor([2.0, 1.0, 0.0]), 1.0) == 2
    assert energy_rank(torch.zeros(3), 0.9) == 1
    assert energy_rank(torch.ones(1), 1.0) == 1


@given(st.integers(0, 10_000), st.integers(1, 512))
def test_rounded_ranks_are_the_nearest_multiples(rank, multiple):
    down, up = round_rank_down(rank, multiple), round_rank_up(rank, multiple)
    assert down % multiple == up % multiple == 0
    assert down <= rank <= up
    assert up - down == (0 if rank % multiple == 0 else multiple)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"ratio {share}.*\(0, 1\].*keeps"):
        ratio_rank(Form.ID, 8, 8, share)
    with pytest.raises(ValueError, match=rf"energy {share}.*\(0, 1\].*0\.95"):
        energy_rank(torch.ones(3), share)


@pytest.mark.parametrize("multiple", [0, -8])
def test_a_multiple_that_is_no_multiple_is_refused(multiple):
    for rounding in (round_rank_down, round_rank_up):
        with pytest.raises(ValueError, match=rf"{multiple}.*positive"):
            rounding(10, multiple)


@pytest.mark.parametrize(
    "spectrum", [torch.tensor([1.0, math.nan]), torch.ones(0), torch.ones(2, 2)]
)
def test_a_spectrum_that_is_none_is_refused(spectrum):
    with pytest.raises(ValueError, match="singular values"):
        energy_rank(spectrum, 0.9)
