"""Q-DEIM depends on the subspace, not on its basis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from cur_modifier.linalg import (
    qdeim,
)

from ..strategies import (
    DTYPES,
    assert_selection,
    bases,
    orthonormal,
    seeded,
)


@given(bases())
def test_qdeim_depends_on_the_subspace_alone(V):
    r = V.shape[1]
    rotated = V @ orthonormal(r, r, seeded(1))
    assert qdeim(V).unique().equal(qdeim(rotated).unique())


@given(bases())
def test_the_chosen_block_stays_invertible(V):
    """The proven bound: √(m−r+1)·√(4^r+6r−1)/3."""
    m, r = V.shape
    amplification = 1 / float(torch.linalg.svdvals(V[qdeim(V)])[-1])
    bound = ((m - r + 1) * (4.0**r + 6 * r - 1)) ** 0.5 / 3
    assert amplification <= max(1, bound) * (1 + 1e-9)


@given(bases(), DTYPES)
def test_rows_are_distinct_and_in_range(V, dtype):
    V = V.to(dtype)
    before = V.clone()
    assert_selection(qdeim(V), V.shape[1], V.shape[0])
    assert torch.equal(V, before)


def test_a_bad_basis_is_named():
    with pytest.raises(ValueError, match=r"basis.*NaN"):
        qdeim(torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match=r"basis has shape \(2, 4\).*as many rows as columns"):
        qdeim(torch.ones(2, 4))
