"""The compact form of a low-rank pair: its row interpolative decomposition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cur_modifier.linalg.checks import require_finite
from cur_modifier.linalg.forms import LowRank, RowID
from cur_modifier.linalg.selection import deim
from cur_modifier.linalg.subspace import lstsq

__all__ = ["LARGEST_ENTRY", "compact", "require_row_id", "row_id", "stacking_order"]

# Below this a pivot is rounding: the row to bring in depends on the rows that would stay.
_DEPENDENT = torch.finfo(torch.float64).eps ** 0.5
# A choice of rows that saves time when the model runs is given up for single rows of each factor's
# own where it leaves a larger entry of T.
LARGEST_ENTRY = 8.0
# Pairs of rows are swapped for a volume this many times larger.
_PAIR_VOLUME = 1.2


def compact(
    pair: LowRank,
    *,
    max_entry: float = 2.0,
    blocks: Sequence[tuple[int, int]] | None = None,
    in_pairs: bool = False,
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

    ``in_pairs`` chooses rows ``2i`` and ``2i + 1`` together, so that the outputs can be put in
    order two at a time: two 16-bit numbers are one word, and gathering words costs a tenth of
    gathering halves (CPU, 256 tokens). The pivots of LU are then 2×2, the swaps for a larger
    ``|det A[I]|``. On SmolLM2 that leaves ``max |T|`` at 2 to 4 and the norms of its rows within a
    tenth of what single rows give. Where an entry above 8 remains, or the number of rows, the rank
    or a block is odd, single rows are chosen.

    Args:
        max_entry: bound on ``max |T|`` of single rows, above 1. Each swap grows ``|det A[I]|`` by
            at least this.
        blocks: ``(m_k, c_k)`` of every block, top to bottom: its rows, and how many of them are to
            be in the skeleton. They add up to ``m`` and ``r``.

    Cost: ``2 m r²`` flops and ``2 (m − r) r`` a swap; twice that for pairs.

    Source: Cheng, Gimbutas, Martinsson, Rokhlin 2005; the swaps are those of Goreinov et al. 2010
    (maxvol) and of Gu and Eisenstat 1996.

    Raises:
        ValueError: a factor is not finite, the left one is wide, ``max_entry`` is not above 1, or
            the blocks do not fit.
    """
    require_row_id(pair)
    if not max_entry > 1:
        raise ValueError(f"max_entry is {max_entry}; swapping rows terminates only above 1.")
    if blocks is not None:
        _require_blocks(blocks, *pair.A.shape)
    A = pair.A.double()
    counts = [*A.shape, *(count for block in blocks or () for count in block)]
    found = None
    if in_pairs and not any(count % 2 for count in counts):
        found = _well_conditioned_pairs(A, blocks)
    return row_id(pair, *(found or _well_conditioned_rows(A, max_entry, blocks)))


def require_row_id(pair: LowRank) -> None:
    """Raises:
    ValueError: the pair is no row ID of its rank: the left factor is wide, or one not finite.
    """
    if pair.A.shape[0] < pair.A.shape[1]:
        raise ValueError(
            f"the left factor has shape {tuple(pair.A.shape)}; a row ID needs at least as many "
            "rows as the rank. Lower the rank."
        )
    require_finite(pair.A, "the left factor")
    require_finite(pair.B, "the right factor")


def row_id(pair: LowRank, chosen: torch.Tensor, rest: torch.Tensor) -> RowID:
    """The pair as a row ID whose skeleton is made of the rows ``chosen`` of ``A``."""
    A = pair.A.double()
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
    exchange = _Exchange(A, deim(A), blocks, run=1)
    exchange.improve(max_entry)
    return exchange.chosen, exchange.rest


def _well_conditioned_pairs(
    A: torch.Tensor, blocks: Sequence[tuple[int, int]] | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same of rows ``2i, 2i + 1`` taken together, or None where single rows do better."""
    start = _pivot_pairs(A)
    if start is None:
        return None
    exchange = _Exchange(A, start, blocks, run=2)
    exchange.improve(_PAIR_VOLUME)
    return None if exchange.largest() > LARGEST_ENTRY else (exchange.chosen, exchange.rest)


def _pivot_pairs(A: torch.Tensor) -> torch.Tensor | None:
    """Row pivots ``(r,)`` of LU with 2×2 pivots of ``A (m, r)``: of every two columns, the pair of
    rows ``2i, 2i + 1`` with the largest determinant. None where ``A`` has no full rank."""
    left, rounding = A.clone(), (_DEPENDENT * A.abs().max()) ** 2
    open_pairs = torch.ones(len(A) // 2, dtype=torch.bool, device=A.device)
    pivots = []
    for column in range(0, A.shape[1], 2):
        ahead, block = left[:, column + 2 :], left[:, column : column + 2]
        size = torch.where(open_pairs, _volumes(block, run=2).squeeze(1), -1)
        pair = int(size.argmax())
        if size[pair] <= rounding:
            return None
        open_pairs[pair] = False
        pivots.append(pair)
        own = slice(2 * pair, 2 * pair + 2)
        ahead -= torch.linalg.solve(block[own], block, left=False) @ ahead[own].clone()
    first = 2 * torch.tensor(pivots, device=A.device)
    return torch.stack([first, first + 1], dim=1).flatten()


def _volumes(T: torch.Tensor, run: int) -> torch.Tensor:
    """``|det|`` of every ``run × run`` block of ``T``; ``run`` is 1 or 2."""
    if run == 1:
        return T.abs()
    return (T[::2, ::2] * T[1::2, 1::2] - T[::2, 1::2] * T[1::2, ::2]).abs()


class _Exchange:
    """A choice of rows ``I`` of ``A (m, r)``, in runs of neighbours, that is improved by swaps.

    Attributes:
        chosen, rest: the rows in ``I`` and the others, run by run.
        T: ``A[rest] A[I]⁻¹``. Its volumes, the determinants of its ``run × run`` blocks, are the
            factors by which a swap of two runs changes ``|det A[I]|``.
    """

    def __init__(
        self,
        A: torch.Tensor,
        chosen: torch.Tensor,
        blocks: Sequence[tuple[int, int]] | None,
        *,
        run: int,
    ) -> None:
        m = len(A)
        self.run = run
        self.chosen = chosen
        unchosen = torch.ones(m, dtype=torch.bool, device=A.device)
        unchosen[chosen] = False
        self.rest = unchosen.nonzero().squeeze(1)
        self.T = lstsq(A[chosen].mT, A[self.rest].mT).mT
        self._block: torch.Tensor | None = None
        self._spanning = True
        if blocks is not None and self.rest.numel():
            sizes, quotas = torch.tensor(blocks, device=A.device).unbind(1)
            self._block = torch.arange(len(blocks), device=A.device).repeat_interleave(sizes)
            self._meet_quotas(quotas)

    def improve(self, volume: float) -> None:
        """Swap runs, the largest volume first, until none is above ``volume``.

        Swaps stay within blocks. Without a ``T`` that is exact there is nothing to go by.
        """
        if not (self._spanning and self.rest.numel()):
            return
        for _ in range(10 * len(self.chosen)):  # a guard against rounding; a volume is bounded
            size = self._within(_volumes(self.T, self.run), self.run)
            i, j = divmod(int(size.argmax()), size.shape[1])
            if size[i, j] <= volume:
                break
            self._swap(i, j)

    def largest(self) -> float:
        """``max |T|`` of the entries that are bounded; infinite where ``T`` is not exact."""
        if not self._spanning:
            return torch.inf
        return float(self._within(self.T.abs(), 1).max()) if self.rest.numel() else 0.0

    def _within(self, size: torch.Tensor, run: int) -> torch.Tensor:
        """``size`` by runs, with 0 where the two are in different blocks."""
        if self._block is None:
            return size
        own = self._block[self.rest[::run]][:, None] == self._block[self.chosen[::run]]
        return torch.where(own, size, 0)

    def _meet_quotas(self, quotas: torch.Tensor) -> None:
        """Swap runs between blocks until the chosen rows hold every block as often as they shall.

        Where they can't without losing rank, they no longer span the others.
        """
        assert self._block is not None
        run = self.run
        excess = torch.bincount(self._block[self.chosen], minlength=len(quotas)) - quotas
        while bool((excess > 0).any()):
            columns = (excess[self._block[self.chosen[::run]]] > 0).nonzero().squeeze(1)
            rows = (excess[self._block[self.rest[::run]]] < 0).nonzero().squeeze(1)
            size = _volumes(self.T, run)[rows][:, columns]
            a, b = divmod(int(size.argmax()), len(columns))
            i, j = int(rows[a]), int(columns[b])
            excess[self._block[self.chosen[run * j]]] -= run
            excess[self._block[self.rest[run * i]]] += run
            if self._spanning and size[a, b] > _DEPENDENT:
                self._swap(i, j)
            else:
                self._spanning = False
                self._trade(i, j)

    def _swap(self, i: int, j: int) -> None:
        """Swap run ``i`` of the rest for run ``j`` of the chosen, and make ``T`` theirs."""
        T, run = self.T, self.run
        out, into = slice(run * i, run * (i + 1)), slice(run * j, run * (j + 1))
        pivot, row = T[out, into].clone(), T[out].clone()
        column = torch.linalg.solve(pivot, T[:, into], left=False)
        T -= column @ row
        T[:, into] = column
        T[out] = -torch.linalg.solve(pivot, row)
        T[out, into] = torch.linalg.inv(pivot)
        self._trade(i, j)

    def _trade(self, i: int, j: int) -> None:
        run = self.run
        out, into = slice(run * i, run * (i + 1)), slice(run * j, run * (j + 1))
        self.chosen[into], self.rest[out] = self.rest[out].clone(), self.chosen[into].clone()
