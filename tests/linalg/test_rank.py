import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import energy_rank, round_rank_down, round_rank_up


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
