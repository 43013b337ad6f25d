"""The compact form of a low-rank pair: its row interpolative decomposition."""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import require_finite
from cur_modifier.linalg.forms import LowRank, RowID
from cur_modifier.linalg.selection import deim
from cur_modifier.linalg.subspace import lstsq

__all__ = ["compact", "stacking_order"]


def compact(pair: LowRank, *, max_entry: float = 2.0) -> RowID:
    """A low-rank pair as a row ID, without loss: ``S = A[I] B``, ``T = A[rest] A[I]⁻¹``.

    It stores ``r (m + n − r)`` numbers where the pair stores ``r (m + n)``. The rows ``I`` start
    from LU pivots of ``A`` and are swapped until no entry of ``T`` exceeds ``max_entry`` in
    magnitude: large entries would cancel in low precision.

    Args:
        max_entry: bound on ``max |T|``, above 1. Each swap grows ``|det A[I]|`` by at least this.

    Cost: ``2 m r²`` flops and ``2 (m − r) r`` a swap.

    Source: Cheng, Gimbutas, Martinsson, Rokhlin 2005; the swaps are those of Goreinov et al. 2010
    (maxvol) and of Gu and Eisenstat 1996.

    Raises:
        ValueError: a factor is not finite, the left one is wide, or ``max_entry`` is not above 1.
    """
    if pair.A.shape[0] < pair.A.shape[1]:
        raise ValueError(
            f"the left factor has shape {tuple(pair.A.shape)}; a row ID needs at least as many "
            "rows as the rank. Lower the rank."
        )
    require_finite(pair.A, "the left factor")
    require_finite(pair.B, "the right factor")
    if not max_entry > 1:
        raise ValueError(f"max_entry is {max_entry}; swapping rows terminates only above 1.")
    A = pair.A.double()
    chosen, rest = _well_conditioned_rows(A, max_entry)
    T = lstsq(A[chosen].mT, A[rest].mT).mT
    S = A[chosen] @ pair.B.double()
    return RowID(S=S.to(pair.B), T=T.to(pair.B), order=stacking_order(chosen, rest))


def stacking_order(chosen: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return torch.argsort(torch.cat([chosen, rest]))


def _well_conditioned_rows(A: torch.Tensor, max_entry: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``I`` of ``A (m, r)`` with ``max |A[rest] A[I]⁻¹| ≤ max_entry``, and the rest."""
    m, rank = A.shape
    chosen = deim(A)
    unchosen = torch.ones(m, dtype=torch.bool, device=A.device)
    unchosen[chosen] = False
    rest = unchosen.nonzero().squeeze(1)
    if rest.numel() == 0:
        return chosen, rest
    T = lstsq(A[chosen].mT, A[rest].mT).mT
    for _ in range(10 * rank):  # a guard against rounding; each swap doubles a bounded volume
        flat = int(T.abs().argmax())
        i, j = divmod(flat, rank)
        pivot = T[i, j].clone()
        if pivot.abs() <= max_entry:
            break
        row, column = T[i].clone(), T[:, j].clone()
        T -= torch.outer(column, row) / pivot
        T[:, j] = column / pivot
        T[i] = -row / pivot
        T[i, j] = 1 / pivot
        chosen[j], rest[i] = rest[i].clone(), chosen[j].clone()
    return chosen, rest
