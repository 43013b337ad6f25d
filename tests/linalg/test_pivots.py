"""Rows by exchange: bounded entries, quotas of blocks, and one order for several matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cur_modifier.linalg.pivots import (
    LARGEST_ENTRY,
    common_pivots,
    swapped,
    well_conditioned_pairs,
    well_conditioned_rows,
)

from .strategies import SEEDS, gaussian, orthonormal, seeded


@st.composite
def tall(draw, unit: int = 1):
    """A matrix of full rank with at least as many rows as columns, in multiples of ``unit``."""
    rank = unit * draw(st.integers(1, 6))
    return gaussian(rank + unit * draw(st.integers(0, 8)), rank, seeded(draw(SEEDS)))


def interpolation(A: torch.Tensor, chosen: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return A[rest] @ torch.linalg.inv(A[chosen])


def assert_partition(chosen: torch.Tensor, rest: torch.Tensor, A: torch.Tensor) -> None:
    assert chosen.shape == (A.shape[1],)
    assert torch.equal(torch.cat([chosen, rest]).sort().values, torch.arange(len(A)))


@given(tall(), st.sampled_from([1.01, 1.5, 2.0, 10.0]))
def test_single_rows_bound_the_entries(A, max_entry):
    chosen, rest = well_conditioned_rows(A, max_entry, None)
    assert_partition(chosen, rest, A)
    T = interpolation(A, chosen, rest)
    assert T.numel() == 0 or float(T.abs().max()) <= max_entry * (1 + 1e-6)


@given(tall())
def test_a_smaller_bound_gives_a_larger_volume(A):
    volumes = []
    for max_entry in (1.01, 100.0):
        chosen, _ = well_conditioned_rows(A, max_entry, None)
        volumes.append(float(torch.linalg.det(A[chosen]).abs()))
    assert volumes[0] >= volumes[1] * (1 - 1e-9)


@given(tall(unit=2))
def test_pairs_are_neighbours_and_bound_the_entries(A):
    found = well_conditioned_pairs(A, None)
    assume(found is not None)
    chosen, rest = found
    assert_partition(chosen, rest, A)
    for rows in (chosen, rest):
        assert bool((rows[::2] % 2 == 0).all()) and torch.equal(rows[1::2], rows[::2] + 1)
    T = interpolation(A, chosen, rest)
    assert T.numel() == 0 or float(T.abs().max()) <= LARGEST_ENTRY * (1 + 1e-6)


def test_pairs_of_copies_span_too_little():
    A = gaussian(6, 4, seeded(0)).repeat_interleave(2, dim=0)
    assert well_conditioned_pairs(A, None) is None


@pytest.mark.parametrize("choose", [well_conditioned_rows, well_conditioned_pairs])
@given(seed=SEEDS)
def test_every_block_gives_its_quota(choose, seed):
    A = gaussian(14, 6, seeded(seed))
    blocks = [(4, 0), (6, 4), (4, 2)]
    rows = choose is well_conditioned_rows
    found = choose(A, 2.0, blocks) if rows else choose(A, blocks)
    assume(found is not None)
    block = torch.arange(3).repeat_interleave(torch.tensor([size for size, _ in blocks]))
    assert torch.bincount(block[found[0]], minlength=3).tolist() == [quota for _, quota in blocks]


@given(st.lists(tall(), min_size=1, max_size=1))
def test_pivots_of_one_matrix_are_those_of_lu(factors):
    [A] = factors
    sequence = common_pivots(factors)
    assert sequence is not None
    assert torch.equal(sequence.sort().values, torch.arange(len(A)))
    lu = torch.linalg.lu(A).P.argmax(0)  # row i of P^T A comes from here
    assert torch.equal(sequence[: A.shape[1]], lu[: A.shape[1]])


def test_a_factor_without_rank_has_no_pivots():
    assert common_pivots([torch.zeros(4, 2).double()]) is None
    flat = torch.ones(4, 2).double()
    assert common_pivots([flat, gaussian(4, 3, seeded(0))]) is None


@given(SEEDS, st.integers(2, 12), st.data())
def test_swaps_enlarge_the_product_of_volumes_until_none_would(seed, m, data):
    generator = seeded(seed)
    ranks = data.draw(st.lists(st.integers(1, m), min_size=1, max_size=3))
    factors = [orthonormal(m, rank, generator) for rank in ranks]
    start = common_pivots(factors)
    assume(start is not None)
    before = start.clone()
    end = swapped(factors, start)
    assert torch.equal(start, before)
    assert torch.equal(end.sort().values, torch.arange(m))

    def volume(sequence: torch.Tensor) -> float:
        sides = [torch.linalg.det(A[sequence[: A.shape[1]]]).abs() for A in factors]
        return float(torch.stack(sides).prod())

    assert volume(end) >= volume(start) * (1 - 1e-9)
    for i in range(m):
        for j in range(i):
            other = end.clone()
            other[[i, j]] = other[[j, i]]
            assert volume(other) <= 1.1 * volume(end) * (1 + 1e-6) + 1e-12
