"""A skeleton that takes a fixed number of rows from every one of several stacked blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    LowRank,
    gram_norm,
    interpolative,
    row_id_of_pair,
    skeleton_shares,
    split_rows,
)

from .strategies import SEEDS, full_gram, gaussian, seeded

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@st.composite
def blocks_and_ranks(draw):
    """Sizes of blocks, and how many rows each gives."""
    sizes = draw(SIZES)
    quotas = [draw(st.integers(0, size)) for size in sizes]
    assume(sum(quotas) >= 1)
    return list(zip(sizes, quotas, strict=True))


def pair_of(blocks: list[tuple[int, int]], n: int, seed: int) -> LowRank:
    m, rank = (sum(column) for column in zip(*blocks, strict=True))
    generator = seeded(seed)
    return LowRank(A=gaussian(m, rank, generator), B=gaussian(rank, n, generator))


@given(blocks_and_ranks(), st.integers(1, 9), SEEDS, st.sampled_from([1.01, 2.0]))
def test_every_block_gives_its_number_and_nothing_is_lost(blocks, n, seed, max_entry):
    pair = pair_of(blocks, n, seed)
    row_id = row_id_of_pair(pair, max_entry=max_entry, blocks=blocks)
    sizes = [size for size, _ in blocks]
    parts = split_rows(row_id, sizes)
    assert [part.direct_outputs for part in parts] == [quota for _, quota in blocks]
    chosen = pair.A[row_id.rows]
    slack = 1e-13 * float(torch.linalg.cond(chosen)) * float(pair.A.norm() * pair.B.norm())
    torch.testing.assert_close(row_id.dense(), pair.dense(), rtol=0, atol=slack)


@given(blocks_and_ranks(), SEEDS, st.sampled_from([1.01, 1.5, 4.0]))
def test_the_entries_within_a_block_are_bounded(blocks, seed, max_entry):
    pair = pair_of(blocks, 5, seed)
    row_id = row_id_of_pair(pair, max_entry=max_entry, blocks=blocks)
    assume(float(torch.linalg.cond(pair.A[row_id.rows])) < 1e6)
    block = torch.arange(len(blocks)).repeat_interleave(torch.tensor([size for size, _ in blocks]))
    rest = torch.argsort(row_id.order)[row_id.rank :]
    within = block[rest][:, None] == block[row_id.rows]
    largest = (row_id.T.abs() * within).flatten().tolist()
    assert max(largest, default=0.0) <= max_entry * (1 + 1e-6)


@given(st.integers(1, 20), st.integers(0, 3), SEEDS)
def test_one_block_is_the_free_choice(m, more, seed):
    pair = LowRank(A=gaussian(m + more, m, seeded(seed)), B=gaussian(m, 4, seeded(seed + 1)))
    free, bound = row_id_of_pair(pair), row_id_of_pair(pair, blocks=[(m + more, m)])
    assert torch.equal(free.order, bound.order) and torch.equal(free.T, bound.T)


def test_a_block_that_has_less_to_give_costs_accuracy_and_nothing_else():
    """Three equal rows can give one independent row, not two."""
    A = torch.eye(5, 3, dtype=torch.float64)
    A[2:] = torch.tensor([0.0, 0.0, 1.0])
    pair = LowRank(A=A, B=gaussian(3, 4, seeded(0)))
    row_id = row_id_of_pair(pair, blocks=[(2, 1), (3, 2)])
    assert [p.direct_outputs for p in split_rows(row_id, [2, 3])] == [1, 2]
    assert bool(torch.isfinite(row_id.T).all()) and float(row_id.T.abs().max()) <= 1
    error = (row_id.dense() - pair.dense()).norm(dim=1)
    assert sorted(error.gt(1e-9).tolist()) == [False] * 4 + [True]


@given(SEEDS, st.booleans())
def test_the_fit_is_as_good_as_with_free_rows(seed, weighted):
    """Which rows make the skeleton changes what is stored, not the product."""
    generator = seeded(seed)
    W, gram = gaussian(24, 10, generator), full_gram(10, generator)
    factor = gaussian(24, 48, generator)
    outputs = factor @ factor.T / 48 if weighted else None
    free = interpolative(W, 8, gram, outputs=outputs)
    bound = interpolative(W, 8, gram, outputs=outputs, blocks=[(12, 4), (6, 4), (6, 0)])
    difference = gram_norm(free.dense() - bound.dense(), gram)
    assert difference <= 1e-6 * gram_norm(W, gram)


def test_rows_and_blocks_exclude_each_other():
    with pytest.raises(ValueError, match="the rows decide"):
        interpolative(torch.eye(4), 2, rows=torch.tensor([0, 1]), blocks=[(2, 1), (2, 1)])


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([(3, 2)], "make 3 rows and rank 2"),
        ([(3, 1), (3, 2)], "rank 3; the left factor has 6 rows and rank 2"),
        ([(1, 2), (5, 0)], "between 0 and all"),
        ([(3, 3), (3, -1)], "between 0 and all"),
    ],
)
def test_blocks_that_do_not_fit_are_named(blocks, reason):
    pair = LowRank(A=gaussian(6, 2, seeded(0)), B=gaussian(2, 3, seeded(1)))
    with pytest.raises(ValueError, match=reason):
        row_id_of_pair(pair, blocks=blocks)


@given(SEEDS, st.integers(1, 3))
def test_blocks_give_what_they_have(seed, multiple_of):
    """A block of zeros gives nothing, one of independent large rows all it can."""
    generator = seeded(seed)
    W = torch.cat(
        [torch.zeros(6, 12), gaussian(6, 12, generator), 1e-3 * gaussian(6, 12, generator)]
    )
    assert skeleton_shares(W.double(), 6, [6, 6, 6], multiple_of=multiple_of) == [0, 6, 0]
