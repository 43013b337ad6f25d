"""The compact form of a low-rank pair: its row interpolative decomposition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cur_modifier.linalg.checks import require_finite
from cur_modifier.linalg.forms import LowRank, RowID
from cur_modifier.linalg.selection import deim
from cur_modifier.linalg.subspace import lstsq

__all__ = ["compact", "stacking_order"]

# Below this a pivot is rounding: the row to bring in depends on the rows that would stay.
_DEPENDENT = torch.finfo(torch.float64).eps ** 0.5


def compact(
    pair: LowRank,
    *,
    max_entry: float = 2.0,
    blocks: Sequence[tuple[int, int]] | None = None,
) -> RowID:
    """A low-rank pair as a row ID, without loss: ``S = A[I] B``, ``T = A[rest] A[I]⁻¹``.

    It stores ``r (m + n − r)`` numbers where the pair stores ``r (m + n)``. The rows ``I`` start
    from LU pivots of ``A`` and are swapped until no entry of ``T`` exceeds ``max_entry`` in
    magnitude: large entries would cancel in low precision.

    With ``blocks`` the rows are stacked blocks, each of which gives the skeleton a fixed number of
    rows. The pivots are then first swapped between blocks, by the largest entries of ``T`` first,
    until every block gives its number, and after that only within blocks. So only those entries of
    ``T`` that interpolate an output from skeleton rows of its own block keep the bound; the others
    have none. Where a block has fewer independent rows than it has to give, no such rows need span
    those of ``A``: ``T`` is then the least-squares interpolation, and there is a loss.

    Args:
        max_entry: bound on ``max |T|``, above 1. Each swap grows ``|det A[I]|`` by at least this.
        blocks: ``(m_k, c_k)`` of every block, top to bottom: its rows, and how many of them are to
            be in the skeleton. They add up to ``m`` and ``r``.

    Cost: ``2 m r²`` flops and ``2 (m − r) r`` a swap.

    Source: Cheng, Gimbutas, Martinsson, Rokhlin 2005; the swaps are those of Goreinov et al. 2010
    (maxvol) and of Gu and Eisenstat 1996.

    Raises:
        ValueError: a factor is not finite, the left one is wide, ``max_entry`` is not above 1, or
            the blocks do not fit.
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
    if blocks is not None:
        _require_blocks(blocks, *pair.A.shape)
    A = pair.A.double()
    chosen, rest = _well_conditioned_rows(A, max_entry, blocks)
    T = lstsq(A[chosen].mT, A[rest].mT).mT
    S = A[chosen] @ pair.B.double()
    return RowID(S=S.to(pair.B), T=T.to(pair.B), order=stacking_order(chosen, rest))


def stacking_order(chosen: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return torch.argsort(torch.cat([chosen, rest]))


def _require_blocks(blocks: Sequence[tuple[int, int]], m: int, rank: int) -> None:
    sizes, quotas = [size for size, _ in blocks], [quota for _, quota in blocks]
    if sum(sizes) != m or sum(quotas) != rank:
        raise ValueError(
            f"blocks of {sizes} rows that give {quotas} of them make {sum(sizes)} rows and rank "
            f"{sum(quotas)}; the left factor has {m} rows and rank {rank}."
        )
    if any(not 0 <= quota <= size for size, quota in blocks):
        raise ValueError(
            f"blocks of {sizes} rows can't give {quotas} of them: each gives between 0 and all."
        )


def _well_conditioned_rows(
    A: torch.Tensor, max_entry: float, blocks: Sequence[tuple[int, int]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``I`` of ``A (m, r)`` with ``max |A[rest] A[I]⁻¹| ≤ max_entry``, and the rest."""
    m, rank = A.shape
    chosen = deim(A)
    unchosen = torch.ones(m, dtype=torch.bool, device=A.device)
    unchosen[chosen] = False
    rest = unchosen.nonzero().squeeze(1)
    if rest.numel() == 0:
        return chosen, rest
    T = lstsq(A[chosen].mT, A[rest].mT).mT
    elsewhere = None
    if blocks is not None:
        sizes, quotas = torch.tensor(blocks, device=A.device).unbind(1)
        block = torch.arange(len(blocks), device=A.device).repeat_interleave(sizes)
        if not _meet_quotas(T, chosen, rest, block, quotas):
            return chosen, rest
        elsewhere = block[rest][:, None] != block[chosen]
    for _ in range(10 * rank):  # a guard against rounding; each swap doubles a bounded volume
        size = T.abs()
        if elsewhere is not None:
            size.masked_fill_(elsewhere, 0)
        i, j = divmod(int(size.argmax()), rank)
        if size[i, j] <= max_entry:
            break
        _swap(T, chosen, rest, i, j)
    return chosen, rest


def _meet_quotas(
    T: torch.Tensor,
    chosen: torch.Tensor,
    rest: torch.Tensor,
    block: torch.Tensor,
    quotas: torch.Tensor,
) -> bool:
    """Swap rows between blocks until ``block[chosen]`` holds every block as often as it shall.

    Returns:
        Whether the chosen rows still span the others: ``T`` is then theirs.
    """
    excess = torch.bincount(block[chosen], minlength=len(quotas)) - quotas
    spanning = True
    while bool((excess > 0).any()):
        columns = (excess[block[chosen]] > 0).nonzero().squeeze(1)
        rows = (excess[block[rest]] < 0).nonzero().squeeze(1)
        a, b = divmod(int(T[rows][:, columns].abs().argmax()), len(columns))
        i, j = int(rows[a]), int(columns[b])
        excess[block[chosen[j]]] -= 1
        excess[block[rest[i]]] += 1
        if spanning and T[i, j].abs() > _DEPENDENT:
            _swap(T, chosen, rest, i, j)
        else:
            spanning = False
            chosen[j], rest[i] = rest[i].clone(), chosen[j].clone()
    return spanning


def _swap(T: torch.Tensor, chosen: torch.Tensor, rest: torch.Tensor, i: int, j: int) -> None:
    """Swap row ``rest[i]`` for ``chosen[j]``, and make ``T`` that of the new rows, in place."""
    pivot = T[i, j].clone()
    row, column = T[i].clone(), T[:, j].clone()
    T -= torch.outer(column, row) / pivot
    T[:, j] = column / pivot
    T[i] = -row / pivot
    T[i, j] = 1 / pivot
    chosen[j], rest[i] = rest[i].clone(), chosen[j].clone()
