"""What forms store, and which rank meets a wish."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.forms.sizes import FORMS, Shape, Sizes, dense_parameters

SIDES = st.integers(2, 20_000)


SIZES = st.sampled_from(list(FORMS.values()))


@given(SIZES, st.integers(2, 30), st.integers(1, 30), st.booleans(), st.data())
def test_parameters_are_the_entries_of_the_tensors(
    sizes: Sizes, m: int, n: int, bias: bool, data: Any
) -> None:
    r = data.draw(st.integers(1, sizes.largest_rank(m, n)))
    spec = Shape(m, n, r)
    shapes = sizes.tensors(spec, bias=bias)
    indices = sizes.indices(spec)
    stored = sum(math.prod(shape) for name, shape in shapes.items() if name not in indices)
    assert sizes.parameters(m, n, r, bias=bias) == sizes.stored(spec, bias=bias) == stored
    assert dense_parameters(m, n, bias=bias) == m * n + m * bias


@given(st.integers(2, 30), st.integers(2, 30), st.data())
def test_parameters_have_their_closed_forms(m: int, n: int, data: Any) -> None:
    r = data.draw(st.integers(1, min(m - 1, n)))
    closed = {"cur": r * (m + n + r), "id": r * (m + n - r), "low_rank": r * (m + n)}
    for name, sizes in FORMS.items():
        assert sizes.parameters(m, n, r) == closed[name]


@given(SIZES, SIDES, SIDES, st.floats(0, 1, exclude_min=True), st.booleans())
def test_ratio_rank_is_the_largest_within_budget(
    sizes: Sizes, m: int, n: int, ratio: float, bias: bool
) -> None:
    rank = sizes.ratio_rank(m, n, ratio, bias=bias)
    budget = ratio * dense_parameters(m, n, bias=bias)
    assert 0 <= rank <= sizes.largest_rank(m, n)
    if rank:
        assert sizes.parameters(m, n, rank, bias=bias) <= budget
    if rank < sizes.largest_rank(m, n):
        assert sizes.parameters(m, n, rank + 1, bias=bias) > budget


@given(SIZES, SIDES, SIDES, st.booleans())
def test_break_even_rank_is_the_last_that_saves_anything(
    sizes: Sizes, m: int, n: int, bias: bool
) -> None:
    rank = sizes.break_even_rank(m, n, bias=bias)
    dense = dense_parameters(m, n, bias=bias)
    assert rank == 0 or sizes.parameters(m, n, rank, bias=bias) < dense
    if rank < sizes.largest_rank(m, n):
        assert sizes.parameters(m, n, rank + 1, bias=bias) >= dense


@given(SIDES, SIDES)
def test_break_even_rank_of_cur_is_curing_s_closed_form(m: int, n: int) -> None:
    # ⌈(√D − s)/2⌉ − 1 in integers: the largest r with 2r + s < √D.
    s, discriminant = m + n, m * m + 6 * m * n + n * n
    expected = (math.isqrt(discriminant - 1) - s) // 2
    assert FORMS["cur"].break_even_rank(m, n) == expected
    floating = math.ceil((math.sqrt(discriminant) - s) / 2) - 1
    assert abs(expected - floating) <= (math.isqrt(discriminant) ** 2 == discriminant)


@pytest.mark.parametrize(
    ("ratio", "as_id", "as_cur"), [(0.8, 2264, 1399), (0.6, 1505, 1085), (0.5, 1199, 920)]
)
def test_known_ranks(ratio: float, as_id: int, as_cur: int) -> None:
    assert FORMS["id"].ratio_rank(4096, 4096, ratio) == as_id
    assert FORMS["cur"].ratio_rank(4096, 4096, ratio) == as_cur


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_a_ratio_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"ratio {share}.*\(0, 1\].*keeps"):
        FORMS["id"].ratio_rank(8, 8, share)
