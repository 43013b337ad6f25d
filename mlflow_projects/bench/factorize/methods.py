"""Ways to factor one weight ``W (m, n)``, by name: ours, and what a Python user has without us.

Each takes the weight in float32, the inputs' mean squares ``(n,)`` and the rank. Those of SciPy and
of :mod:`torch.linalg` look at the weight alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import scipy.linalg
import scipy.linalg.interpolative
import torch

from cur_modifier.linalg import (
    CUR,
    LowRank,
    RowID,
    Score,
    Selection,
    cur,
    interpolative,
    score,
    select_rows,
    select_rows_and_columns,
)

__all__ = ["METHODS", "REFERENCE", "Factors", "product"]

Factors = CUR | RowID | LowRank | tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Method = Callable[[torch.Tensor, torch.Tensor, int], Factors]

REFERENCE = "reference"  # the others' times are compared with its


def textbook_deim(V: torch.Tensor) -> torch.Tensor:
    chosen = [int(V[:, 0].abs().argmax())]
    for j in range(1, V.shape[1]):
        coefficients = torch.linalg.solve(V[chosen, :j], V[chosen, j])
        chosen.append(int((V[:, j] - V[:, :j] @ coefficients).abs().argmax()))
    return torch.tensor(chosen)


def reference(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
    """The procedure that CURing's code follows."""
    wide = W.double()
    U, _, V = torch.svd_lowrank(wide.abs() * mean_square.double().sqrt(), q=rank, niter=2)
    rows, columns = textbook_deim(U), textbook_deim(V)
    C, R = wide[:, columns], wide[rows]
    return C, torch.linalg.pinv(C) @ wide @ torch.linalg.pinv(R), R


def truncated_svd(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return LowRank(U[:, :rank] * s[:rank], Vh[:rank])


def pivoted_qr(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
    """Row ID by the first pivots of LAPACK's QR of ``Wᵀ``, which goes on to the end."""
    R, pivots = scipy.linalg.qr(W.T.numpy(), mode="r", pivoting=True)
    rest = scipy.linalg.solve_triangular(R[:rank, :rank], R[:rank, rank:])
    return _row_id(W, pivots, rest, rank)


def scipy_interpolative(*, randomized: bool) -> Method:
    """Row ID by SciPy's ID of the columns of ``Wᵀ``, in float64."""

    def run(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
        found = scipy.linalg.interpolative.interp_decomp(
            W.T.double().numpy(), rank, rand=randomized, rng=0
        )
        return _row_id(W, *found, rank)

    return run


def _row_id(W: torch.Tensor, pivots: Any, rest: Any, rank: int) -> RowID:
    """``W[pivots[r:]] ≈ restᵀ W[pivots[:r]]``."""
    found = torch.as_tensor(pivots, dtype=torch.long)
    return RowID(W[found[:rank]], torch.as_tensor(rest.T).to(W), found.argsort())


def cur_method(selection: Selection, *, fitted: bool = False) -> Method:
    def run(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
        scored = score(Score.WANDA, W, mean_square)
        rows, columns = select_rows_and_columns(selection, scored, rank)
        return cur(W, rows, columns, mean_square if fitted else None)

    return run


def id_method(selection: Selection) -> Method:
    def run(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
        scored = score(Score.WANDA, W, mean_square)
        rows = select_rows(selection, scored, rank)
        return interpolative(W, rank, rows=rows)

    return run


def optimal_id(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
    return interpolative(W, rank)


METHODS: dict[str, Method] = {
    REFERENCE: reference,
    "truncated SVD": truncated_svd,
    "pivoted QR": pivoted_qr,
    "scipy id": scipy_interpolative(randomized=False),
    "scipy id randomized": scipy_interpolative(randomized=True),
    **{f"cur {kind}": cur_method(kind) for kind in Selection},
    "cur deim fitted": cur_method(Selection.DEIM, fitted=True),
    **{f"id {kind}": id_method(kind) for kind in Selection},
    "id optimal": optimal_id,
}


def product(factors: Factors) -> torch.Tensor:
    """``(m, n)``, float32."""
    if isinstance(factors, tuple):
        C, U, R = factors
        return (C @ (U @ R)).float()
    return factors.dense()
