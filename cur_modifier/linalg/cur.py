"""CUR: ``W ≈ C U R`` with real columns and real rows.

Every decomposition takes ``gram``, the inputs' second moment ``G``, in full ``(n, n)``, as a
diagonal ``(n,)``, or None for the plain Frobenius norm, and ``outputs``, a metric ``H`` of the
outputs in full ``(m, m)``, as a diagonal ``(m,)``, or None; it minimises
``‖H^{1/2} (W − Ŵ) G^{1/2}‖_F`` over what it is free to choose. With ``H = E[g gᵀ]`` of the loss's
gradients ``g`` at the outputs this is the loss's second-order growth under the Kronecker
approximation of its curvature (Martens and Grosse 2015). ``H`` must be positive definite. Inputs
are never modified. Results have the dtype of ``W`` (float32 where ``W`` is narrower).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cur_modifier.linalg.checks import prepared, require_indices
from cur_modifier.linalg.fit import fit_right, solve_stored
from cur_modifier.linalg.metric import weighted
from cur_modifier.linalg.problem import Problem
from cur_modifier.linalg.selection import Selection, select_rows_and_columns

__all__ = ["CUR", "cur", "solve"]


@dataclass(frozen=True)
class CUR:
    """``W ≈ C U R``: real columns ``C = W[:, columns] (m, r)``, ``U (r, r)``, real rows
    ``R = W[rows, :] (r, n)``."""

    C: torch.Tensor
    U: torch.Tensor
    R: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @property
    def rank(self) -> int:
        return self.U.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of the product."""
        return self.C.shape[0], self.R.shape[1]

    def dense(self) -> torch.Tensor:
        """The product ``(m, n)``."""
        return self.C @ (self.U @ self.R)


def cur(
    W: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    gram: torch.Tensor | None = None,
    *,
    outputs: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
) -> CUR:
    """CUR with given rows and columns and the best core for them.

    ``U = C⁺ W G Rᵀ (R G Rᵀ)⁺`` minimises ``‖(W − C U R) G^{1/2}‖_F``; without ``gram`` it is
    ``C⁺ W R⁺``. Repeated or dependent rows and columns are handled (minimum-norm ``U``).

    Args:
        W: ``(m, n)``.
        rows, columns: ``r`` indices each.
        gram: ``G``.
        outputs: ``H``.
        target: ``(m, n)``, what the product shall be close to where that is not ``W``, whose rows
            and columns it is made of (:func:`cur_modifier.linalg.anchored_target`).

    Cost: ``2 m n r`` flops and QR of ``(m, r)`` and ``(n, r)``; with a full ``G`` another
    ``2 n² r``, in float64.

    Source: Sorensen and Embree 2016 (the plain core). Under activations it is the same least
    squares, of ``W G^{1/2}`` by ``C`` and ``R G^{1/2}``.

    Raises:
        ValueError: ``W`` or ``gram`` is not finite or does not fit, or rows and columns differ in
            number or lie outside ``W``.
    """
    W = prepared(W, gram)
    if rows.shape != columns.shape or rows.ndim != 1:
        raise ValueError(
            f"got {tuple(rows.shape)} rows and {tuple(columns.shape)} columns; "
            "CUR takes equally many of both, as 1-D index tensors."
        )
    require_indices(rows, W.shape[0], "rows")
    require_indices(columns, W.shape[1], "columns")
    C, R = W[:, columns], W[rows, :]
    if gram is None and outputs is None and target is None:
        U = solve_stored(R.mT, solve_stored(C, W, W.dtype).mT, W.dtype).mT
    else:
        wanted = W if target is None else target
        right = fit_right(wanted.double(), R.double(), gram, W.dtype)
        left, right = (weighted(outputs, side) for side in (C.double(), right))
        U = solve_stored(left, right, W.dtype)
    return CUR(C=C, U=U.to(W), R=R, rows=rows, columns=columns)


def solve(problem: Problem) -> CUR:
    """CUR by the problem's selection, which is DEIM where it names none.

    ``noise`` is passed over: on SmolLM2 a core fitted to the noise gained nothing.

    Raises:
        ValueError: as :func:`cur` and the selection.
    """
    p = problem
    rows, columns = select_rows_and_columns(
        p.selection or Selection.DEIM,
        p.scored,
        p.rank,
        seed=p.seed,
        gram=p.gram,
        outputs=p.outputs,
    )
    return cur(p.W, rows, columns, p.gram, outputs=p.outputs, target=p.target)
