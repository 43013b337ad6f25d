"""Guards name what they refuse, and let everything else through as it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg.checks import (
    at_least_float32,
    prepared,
    require_finite,
    require_gram,
    require_indices,
    require_matrix,
    require_rank,
)

from .strategies import DTYPES, SEEDS, gaussian, grams, matrices, seeded


@given(matrices(), DTYPES)
def test_no_precision_is_lost(W, dtype):
    W = W.to(dtype)
    wide = at_least_float32(W)
    assert wide.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(wide.to(dtype), W)


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 0), (2, 2, 2)])
def test_what_is_no_matrix_is_named(shape):
    with pytest.raises(ValueError, match=r"the weight has shape .*non-empty matrix"):
        require_matrix(torch.ones(shape), "the weight")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_no_real_number_is_named(dtype):
    with pytest.raises(ValueError, match=rf"the weight has dtype {dtype}.*Convert it first"):
        require_matrix(torch.ones(2, 2, dtype=dtype), "the weight")


@given(
    st.lists(
        st.one_of(st.floats(-9, 9), st.sampled_from([torch.nan, torch.inf, -torch.inf])),
        max_size=8,
    )
)
def test_entries_that_are_not_finite_are_counted(values):
    tensor = torch.tensor(values)
    bad = int((~torch.isfinite(tensor)).sum())
    if not bad:
        require_finite(tensor, "the vector")
        return
    with pytest.raises(ValueError, match=rf"the vector .*in {bad} of {len(values)} entries"):
        require_finite(tensor, "the vector")


@given(st.integers(1, 9).flatmap(grams))
def test_a_gram_matrix_is_full_or_a_diagonal(gram):
    n = len(gram)
    require_gram(gram, n)
    with pytest.raises(ValueError, match=rf"expected \({n + 1}, {n + 1}\) or its diagonal"):
        require_gram(gram, n + 1)


@given(st.lists(st.integers(-3, 12), max_size=9), st.integers(1, 10))
def test_the_first_index_outside_is_named(indices, length):
    outside = [index for index in indices if not 0 <= index < length]
    given = torch.tensor(indices, dtype=torch.int64)
    if not outside:
        require_indices(given, length, "rows")
        return
    with pytest.raises(ValueError, match=rf"rows contain index {outside[0]}, .*0\.\.{length - 1}"):
        require_indices(given, length, "rows")


@given(st.integers(-2, 12), st.integers(1, 9))
def test_ranks_run_from_one_to_the_limit(rank, limit):
    if 1 <= rank <= limit:
        require_rank(rank, limit, "a weight")
        return
    with pytest.raises(ValueError, match=rf"rank {rank} is outside 1\.\.{limit} for a weight"):
        require_rank(rank, limit, "a weight")


@given(SEEDS, DTYPES)
def test_a_prepared_weight_has_no_history(seed, dtype):
    W = gaussian(3, 4, seeded(seed)).to(dtype).requires_grad_()
    found = prepared(W, None)
    assert not found.requires_grad and W.requires_grad
    assert torch.equal(found, at_least_float32(W.detach()))
