"""The discrete empirical interpolation method."""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import at_least_float32
from cur_modifier.linalg.selection.basis import require_basis

__all__ = ["deim"]


def deim(V: torch.Tensor) -> torch.Tensor:
    """DEIM indices ``(r,)`` of a basis ``V (m, r)``: one index a column, greedily.

    The textbook loop picks, for column ``j``, the largest entry of the residual of interpolating it
    by the columns before. That residual is the Schur complement of Gaussian elimination, so the
    indices are the row pivots of LU with partial pivoting of ``V``: one call.

    Cost: ``m r²`` flops.

    Source: Chaturantabut and Sorensen 2010, algorithm 1; Sorensen and Embree 2016, section 3.
    """
    require_basis(V)
    pivots = torch.linalg.lu_factor_ex(at_least_float32(V)).pivots.tolist()
    order = list(range(V.shape[0]))
    for step, pivot in enumerate(pivots):  # LAPACK records row swaps, one-based
        order[step], order[pivot - 1] = order[pivot - 1], order[step]
    return torch.tensor(order[: V.shape[1]], device=V.device)
