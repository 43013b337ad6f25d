"""Ranks for many weights out of one budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    RankCurve,
    allocate_ranks,
    apportion,
    truncation_tail,
)


def curve(m: int, n: int, decay: float, scale: float, sign: int = -1) -> RankCurve:
    """Of a form that stores ``r (m + n ± r)`` parameters."""
    spectrum = scale * torch.arange(1, min(m, n) + 1).double() ** -decay

    def stored(rank: int) -> int:
        return rank * (m + n + sign * rank)

    saving = [r for r in range(1, min(m - 1, n) + 1) if stored(r) < m * n]
    return RankCurve(
        loss=truncation_tail(spectrum), factored=stored, dense=m * n, limit=max(saving, default=0)
    )


def stored(curves: list[RankCurve], ranks: list[int | None]) -> int:
    return sum(c.stored(r) for c, r in zip(curves, ranks, strict=True))


def loss(curves: list[RankCurve], ranks: list[int | None]) -> float:
    return sum(0.0 if r is None else float(c.loss[r]) for c, r in zip(curves, ranks, strict=True))


curves_of_any_size = st.lists(
    st.builds(
        curve,
        st.integers(3, 24),
        st.integers(3, 24),
        st.floats(0.2, 3),
        st.floats(0.01, 100),
        st.sampled_from([-1, 0, 1]),
    ),
    min_size=1,
    max_size=5,
)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8))
def test_the_tail_is_what_a_truncation_leaves(squares: list[float]) -> None:
    tail = truncation_tail(torch.tensor(squares))
    assert tail[-1] == 0 and tail[0] == pytest.approx(sum(squares), abs=1e-5)
    assert bool((tail.diff() <= 1e-9).all())


@given(curves_of_any_size, st.floats(0.5, 1), st.integers(1, 3))
def test_the_budget_holds_and_ranks_are_multiples(
    curves: list[RankCurve], ratio: float, multiple_of: int
) -> None:
    try:
        ranks = allocate_ranks(curves, ratio, multiple_of=multiple_of)
    except ValueError as error:
        assert "multiple_of" in str(error)
        return
    assert stored(curves, ranks) <= ratio * sum(c.dense for c in curves)
    assert all(rank is None or rank % multiple_of == 0 for rank in ranks)


@given(curves_of_any_size, st.floats(0.4, 0.95))
def test_never_worse_than_uniform_by_more_than_the_last_step(
    curves: list[RankCurve], ratio: float
) -> None:
    uniform: list[int | None] = [
        max((r for r in range(1, c.limit + 1) if c.stored(r) <= ratio * c.dense), default=None)
        for c in curves
    ]
    if None in uniform:
        return
    ranks = allocate_ranks(curves, ratio)
    # Lagrange multipliers are optimal at the vertices of the convex hull, so what may be lost is
    # bounded by one weight's step between two of them.
    step = max(float(c.loss[1]) for c in curves)
    assert loss(curves, ranks) <= loss(curves, uniform) + step


def test_close_to_the_best_of_all_choices() -> None:
    curves = [curve(8, 9, 0.5, 1.0), curve(12, 7, 2.0, 3.0), curve(9, 9, 1.0, 0.3)]
    budget = 0.6 * sum(c.dense for c in curves)
    every = itertools.product(*([*range(1, c.limit + 1), None] for c in curves))
    best = min(loss(curves, list(r)) for r in every if stored(curves, list(r)) <= budget)
    assert loss(curves, allocate_ranks(curves, 0.6)) <= 1.1 * best


def test_what_matters_gets_the_rank() -> None:
    dull, sharp = curve(32, 32, 1.0, 1.0), curve(32, 32, 1.0, 50.0)
    low, high = allocate_ranks([dull, sharp], 0.6)
    assert low is not None and (high is None or high > low)


def test_a_floor_keeps_every_weight_above_it() -> None:
    curves = [curve(32, 32, 1.0, 1e-6), curve(32, 32, 1.0, 1.0)]
    free = allocate_ranks(curves, 0.7)
    kept = allocate_ranks(curves, 0.7, least=0.5)
    assert curves[0].stored(free[0]) < 0.5 * 32 * 32 <= curves[0].stored(kept[0])


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 8.*Raise the ratio"):
        allocate_ranks([curve(16, 16, 1.0, 1.0)] * 3, 0.1, multiple_of=8)
    with pytest.raises(ValueError, match="outside"):
        allocate_ranks([curve(16, 16, 1.0, 1.0)], 1.5)


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(st.data(), SIZES, st.integers(1, 5))
def test_shares_add_up_and_fit(data, sizes, multiple_of):
    total = data.draw(st.integers(0, sum(sizes)))
    shares = data.draw(
        st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)).filter(sum)
    )
    given_out = apportion(shares, sizes, total, multiple_of=multiple_of)
    assert sum(given_out) == total
    assert all(0 <= c <= size for c, size in zip(given_out, sizes, strict=True))
    possible = sum(size // multiple_of for size in sizes) * multiple_of >= total
    if total % multiple_of == 0 and possible:
        assert all(c % multiple_of == 0 for c in given_out)


def test_shares_are_in_proportion():
    assert apportion([6, 3, 1], [100, 100, 100], 100) == [60, 30, 10]
    assert apportion([6, 3, 1], [100, 100, 100], 96, multiple_of=32) == [64, 32, 0]
    assert apportion([9, 1], [32, 96], 96, multiple_of=32) == [32, 64]


@pytest.mark.parametrize(
    ("shares", "sizes", "total"), [([1], [3, 3], 2), ([0, 0], [3, 3], 2), ([1, 1], [3, 3], 7)]
)
def test_shares_that_cannot_be_met_are_named(shares, sizes, total):
    with pytest.raises(ValueError, match="can't be shared"):
        apportion(shares, sizes, total)
