"""DEIM is the textbook's loop, by one LU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from cur_modifier.linalg import (
    deim,
)

from ..strategies import (
    DTYPES,
    assert_selection,
    bases,
    hilbert,
)


def textbook_deim(V: torch.Tensor) -> list[int]:
    """Chaturantabut and Sorensen 2010, algorithm 1, word by word."""
    chosen = [int(V[:, 0].abs().argmax())]
    for j in range(1, V.shape[1]):
        coefficients = torch.linalg.solve(V[chosen, :j], V[chosen, j])
        residual = V[:, j] - V[:, :j] @ coefficients
        chosen.append(int(residual.abs().argmax()))
    return chosen


@given(bases())
def test_deim_is_the_textbook_loop(V):
    assert deim(V).tolist() == textbook_deim(V)


@pytest.mark.parametrize("n", [5, 10, 15])
def test_deim_is_the_textbook_loop_on_a_hilbert_matrix(n):
    U, _, Vh = torch.linalg.svd(hilbert(2 * n, n), full_matrices=False)
    for basis in (U[:, : n // 2], Vh[: n // 2].T):
        assert deim(basis).tolist() == textbook_deim(basis)


@given(bases())
def test_the_chosen_block_stays_invertible(V):
    """The proven bound: √(mr/3)·2^r."""
    m, r = V.shape
    amplification = 1 / float(torch.linalg.svdvals(V[deim(V)])[-1])
    assert amplification <= max(1, (m * r) ** 0.5) * 2.0**r


@given(bases(), DTYPES)
def test_rows_are_distinct_and_in_range(V, dtype):
    V = V.to(dtype)
    before = V.clone()
    assert_selection(deim(V), V.shape[1], V.shape[0])
    assert torch.equal(V, before)


def test_a_bad_basis_is_named():
    with pytest.raises(ValueError, match=r"basis.*NaN"):
        deim(torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match=r"basis has shape \(2, 4\).*as many rows as columns"):
        deim(torch.ones(2, 4))
