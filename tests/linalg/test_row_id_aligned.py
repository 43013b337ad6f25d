"""Row IDs of several factors in one order of their rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    LowRank,
    gram_norm,
    interpolative,
    interpolative_aligned,
    row_ids_in_one_order,
)

from .strategies import SEEDS, gaussian, seeded

LARGEST_ENTRY = 8.0


@st.composite
def alike(draw):
    """Up to three pairs with equally many outputs, of any ranks."""
    m = draw(st.integers(1, 24))
    generator = seeded(draw(SEEDS))
    ranks = draw(st.lists(st.integers(1, m), min_size=1, max_size=3))
    return [LowRank(A=gaussian(m, r, generator), B=gaussian(r, 5, generator)) for r in ranks]


@given(alike())
def test_nothing_is_lost_and_all_have_one_order(pairs):
    found = row_ids_in_one_order(pairs)
    assert found is not None
    for pair, row_id in zip(pairs, found, strict=True):
        scale = float(torch.linalg.cond(pair.A[row_id.rows]) * pair.A.norm() * pair.B.norm())
        torch.testing.assert_close(row_id.dense(), pair.dense(), rtol=0, atol=1e-13 * scale)
        assert torch.equal(row_id.order, found[0].order)
        assert row_id.T.numel() == 0 or float(row_id.T.abs().max()) <= LARGEST_ENTRY


@given(alike())
def test_the_rows_in_sequence_are_the_products_side_by_side(pairs):
    for row_id in row_ids_in_one_order(pairs) or []:
        sequence = row_id.order.argsort()
        stacked = torch.cat([row_id.S, row_id.T @ row_id.S])
        torch.testing.assert_close(row_id.dense()[sequence], stacked)


@given(alike())
def test_no_swap_would_enlarge_the_volumes_much(pairs):
    """Of two rows that change places, the product of the determinants' growth is bounded."""
    found = row_ids_in_one_order(pairs)
    assert found is not None
    sequence = found[0].order.argsort()
    gain = torch.ones(len(sequence), len(sequence), dtype=torch.float64)
    for pair in pairs:
        rank = pair.A.shape[1]
        grown = pair.A[sequence] @ torch.linalg.inv(pair.A[sequence[:rank]])
        gain[rank:, :rank] *= grown[rank:].abs()
    assert float(gain.tril(-1).max()) <= 1.1 * (1 + 1e-6)


def test_bases_of_real_size_keep_small_entries():
    generator = seeded(0)
    pairs = [
        LowRank(A=torch.linalg.qr(gaussian(192, r, generator)).Q, B=gaussian(r, 64, generator))
        for r in (96, 64)
    ]
    found = row_ids_in_one_order(pairs)
    assert found is not None
    assert max(float(one.T.abs().max()) for one in found) < 4


def test_factors_without_full_rank_have_none():
    generator = seeded(0)
    sound = LowRank(A=gaussian(8, 3, generator), B=gaussian(3, 5, generator))
    flat = LowRank(A=torch.ones(8, 3).double(), B=gaussian(3, 5, generator))
    assert row_ids_in_one_order([sound, flat]) is None
    assert row_ids_in_one_order([LowRank(A=torch.zeros(8, 3).double(), B=sound.B)]) is None


def test_rows_that_serve_only_one_factor_leave_each_its_own():
    """What one needs as skeleton the other has only as rounding."""
    generator = seeded(1)
    tiny = torch.logspace(0, -12, 16).double()[:, None]
    left, right = (gaussian(16, 4, generator) for _ in range(2))
    pairs = [LowRank(A=left * tiny, B=left[:4]), LowRank(A=right * tiny.flip(0), B=right[:4])]
    found = row_ids_in_one_order(pairs)
    if found is not None:
        assert max(float(one.T.abs().max()) for one in found) <= LARGEST_ENTRY
    weights = [pair.dense() for pair in pairs]
    for W, row_id in zip(weights, interpolative_aligned(weights, [4, 4]), strict=True):
        assert gram_norm(W - row_id.dense(), None) <= 1e-6 * gram_norm(W, None)


def test_products_are_the_optimal_approximations():
    weights, ranks, gram, metrics = problem()
    found = interpolative_aligned(weights, ranks, gram, outputs=metrics)
    assert torch.equal(found[0].order, found[1].order)
    for W, rank, H, row_id in zip(weights, ranks, metrics, found, strict=True):
        alone = interpolative(W, rank, gram, outputs=H)
        torch.testing.assert_close(row_id.dense(), alone.dense())


def test_interpolation_expects_the_noise_of_its_own_weight():
    weights, ranks, gram, metrics = problem()
    exact = interpolative_aligned(weights, ranks, gram, outputs=metrics)
    first, second = interpolative_aligned(weights, ranks, gram, noise=[0.05, 0.0], outputs=metrics)
    torch.testing.assert_close(first.S, exact[0].S)
    assert first.T.norm() < exact[0].T.norm()  # it relies less on what is going to be noisy
    torch.testing.assert_close(second.dense(), exact[1].dense())


def problem():
    """Two weights, their ranks, the second moment of their inputs, and metrics of their outputs."""
    generator = seeded(2)
    x = gaussian(64, 24, generator)
    weights = [gaussian(32, 24, generator) for _ in range(2)]
    return weights, [12, 8], x.T @ x / 64, [torch.eye(32).double() + 0.1, None]


def test_bad_input_is_named():
    generator = seeded(0)
    pair = LowRank(A=gaussian(6, 2, generator), B=gaussian(2, 5, generator))
    other = LowRank(A=gaussian(7, 2, generator), B=gaussian(2, 5, generator))
    with pytest.raises(ValueError, match=r"\[6, 7\] outputs; one order needs"):
        row_ids_in_one_order([pair, other])
    with pytest.raises(ValueError, match="got 0 pairs"):
        row_ids_in_one_order([])
    with pytest.raises(ValueError, match="at least as many rows"):
        row_ids_in_one_order([LowRank(A=gaussian(2, 3, generator), B=gaussian(3, 5, generator))])
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        row_ids_in_one_order([LowRank(A=pair.A / 0, B=pair.B)])
