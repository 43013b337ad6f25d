"""Second moments, streamed: the batching does not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    GramAccumulator,
    PairedMoments,
)

from .strategies import (
    DTYPES,
    SEEDS,
    gaussian,
    seeded,
)


@given(SEEDS, st.integers(1, 12), st.lists(st.integers(0, 9), min_size=1, max_size=6), DTYPES)
def test_streaming_equals_one_product_whatever_the_batching(seed, n, batches, dtype):
    x = gaussian(sum(batches) + 1, n, seeded(seed)).to(dtype)
    accumulator = GramAccumulator(n, dtype=torch.float64)
    for batch in x.split([*batches, 1]):
        accumulator.update(batch)
    assert accumulator.tokens == x.shape[0]
    torch.testing.assert_close(accumulator.second_moment(), x.double().T @ x.double() / x.shape[0])


@given(SEEDS)
def test_leading_dimensions_are_tokens(seed):
    x = gaussian(24, 5, seeded(seed)).float()
    flat, batched = GramAccumulator(5), GramAccumulator(5)
    flat.update(x)
    batched.update(x.reshape(2, 3, 4, 5))
    torch.testing.assert_close(flat.second_moment(), batched.second_moment())
    assert flat.tokens == batched.tokens


@given(SEEDS, st.integers(1, 40))
def test_second_moment_is_symmetric_and_positive_semidefinite(seed, n):
    accumulator = GramAccumulator(n)
    accumulator.update(gaussian(17, n, seeded(seed)))
    gram = accumulator.second_moment()
    torch.testing.assert_close(gram, gram.T)
    values = torch.linalg.eigvalsh(gram.double())
    assert values[0] >= -1e-5 * values[-1]


def test_accumulator_refuses_what_it_cannot_use():
    accumulator = GramAccumulator(4)
    with pytest.raises(ValueError, match="no token"):
        accumulator.second_moment()
    with pytest.raises(ValueError, match=r"5 features.* 4"):
        accumulator.update(torch.zeros(2, 5))
    accumulator.update(torch.full((2, 4), torch.nan))
    with pytest.raises(ValueError, match=r"activations.*NaN.*calibration data"):
        accumulator.second_moment()


@given(SEEDS, st.integers(3, 12))
def test_a_massive_feature_leaves_a_half_precision_moment_definite(seed, n):
    x = gaussian(40 * n, n, seeded(seed))
    x[:, 0] = 3000 + x[:, 0]
    moments = PairedMoments(n)
    moments.update(x.bfloat16(), x.bfloat16())
    gram, drift = moments.moments()
    assert float(torch.linalg.eigvalsh(gram.double())[0]) > 0
    assert not drift.any()


def test_paired_moments_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="same tokens"):
        PairedMoments(5).update(torch.ones(2, 5), torch.ones(3, 5))
    with pytest.raises(ValueError, match="no token"):
        PairedMoments(5).moments()


@given(SEEDS, DTYPES)
def test_inputs_are_not_mutated(seed, dtype):
    x = gaussian(6, 6, seeded(seed)).to(dtype)
    before = x.clone()
    accumulator = GramAccumulator(6)
    accumulator.update(x)
    accumulator.second_moment()
    assert torch.equal(x, before)
