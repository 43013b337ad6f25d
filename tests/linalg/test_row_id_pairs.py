"""Skeletons whose rows come in pairs of neighbours."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import LowRank, RowID, interpolative, row_id_of_pair, split_rows

from .strategies import SEEDS, gaussian, seeded

LARGEST_ENTRY = 8.0


def in_pairs(row_id: RowID) -> bool:
    """Outputs 2i and 2i + 1 are neighbouring entries of [z; T z], the first of them even."""
    first, second = row_id.order[::2], row_id.order[1::2]
    return bool((first % 2 == 0).all() and (second == first + 1).all())


@st.composite
def even_pairs(draw):
    rank = 2 * draw(st.integers(1, 6))
    m = rank + 2 * draw(st.integers(0, 8))
    generator = seeded(draw(SEEDS))
    return LowRank(A=gaussian(m, rank, generator), B=gaussian(rank, 5, generator))


@given(even_pairs())
def test_nothing_is_lost_and_entries_are_bounded(pair):
    row_id = row_id_of_pair(pair, in_pairs=True)
    scale = float(torch.linalg.cond(pair.A[row_id.rows]) * pair.A.norm() * pair.B.norm())
    torch.testing.assert_close(row_id.dense(), pair.dense(), rtol=0, atol=1e-13 * scale)
    assert row_id.T.numel() == 0 or float(row_id.T.abs().max()) <= LARGEST_ENTRY * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(64, 16), (96, 64), (128, 40)])
def test_a_basis_gives_pairs(shape):
    A = torch.linalg.qr(gaussian(*shape, seeded(0))).Q
    row_id = row_id_of_pair(LowRank(A=A, B=gaussian(shape[1], 7, seeded(1))), in_pairs=True)
    assert in_pairs(row_id)


def test_rows_of_very_different_size_still_give_pairs():
    generator = seeded(3)
    A = torch.linalg.qr(gaussian(64, 16, generator)).Q * torch.logspace(-6, 6, 64)[:, None]
    row_id = row_id_of_pair(LowRank(A=A.double(), B=gaussian(16, 8, generator)), in_pairs=True)
    assert in_pairs(row_id)


@pytest.mark.parametrize("shape", [(9, 4), (8, 3)])
def test_odd_numbers_give_single_rows(shape):
    pair = LowRank(A=gaussian(*shape, seeded(0)), B=gaussian(shape[1], 5, seeded(1)))
    assert torch.equal(row_id_of_pair(pair, in_pairs=True).order, row_id_of_pair(pair).order)


def test_rows_that_only_span_apart_are_chosen_apart():
    # Both rows of every pair are alike, so no pair is worth more than one of its rows.
    single = gaussian(8, 4, seeded(0))
    pair = LowRank(A=single.repeat_interleave(2, dim=0), B=gaussian(4, 5, seeded(1)))
    row_id = row_id_of_pair(pair, in_pairs=True)
    assert not in_pairs(row_id)
    torch.testing.assert_close(row_id.dense(), pair.dense(), rtol=0, atol=1e-12)


@given(SEEDS, st.sampled_from([[(8, 4), (6, 2)], [(6, 0), (8, 6)], [(4, 4), (10, 4)]]))
def test_blocks_give_their_number_in_pairs(seed, blocks):
    m, rank = (sum(column) for column in zip(*blocks, strict=True))
    generator = seeded(seed)
    pair = LowRank(A=gaussian(m, rank, generator), B=gaussian(rank, 5, generator))
    row_id = row_id_of_pair(pair, blocks=blocks, in_pairs=True)
    parts = split_rows(row_id, [size for size, _ in blocks])
    assert [part.direct_outputs for part in parts] == [quota for _, quota in blocks]
    scale = float(torch.linalg.cond(pair.A[row_id.rows]) * pair.A.norm() * pair.B.norm())
    torch.testing.assert_close(row_id.dense(), pair.dense(), rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_optimal_row_id_comes_in_pairs(noise):
    W = gaussian(48, 32, seeded(0))
    row_id = interpolative(W, 16, W.mT @ W, noise=noise)
    assert in_pairs(row_id)
