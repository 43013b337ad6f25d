"""Well-conditioned rows by exchange: single ones, pairs, and in one order for several matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cur_modifier.linalg.selection import deim
from cur_modifier.linalg.subspace import lstsq

__all__ = [
    "LARGEST_ENTRY",
    "common_pivots",
    "swapped",
    "well_conditioned_pairs",
    "well_conditioned_rows",
]

# Below this a pivot is rounding: the row to bring in depends on the rows that would stay.
_DEPENDENT = torch.finfo(torch.float64).eps ** 0.5
# A choice of rows that saves time when the model runs is given up for single rows of each factor's
# own where it leaves a larger entry of T.
LARGEST_ENTRY = 8.0
# Pairs of rows are swapped for a volume this many times larger.
_PAIR_VOLUME = 1.2
# Rows of an order are swapped for a product of volumes this many times larger.
_ORDER_VOLUME = 1.1


def well_conditioned_rows(
    A: torch.Tensor, max_entry: float, blocks: Sequence[tuple[int, int]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``I`` of ``A (m, r)`` with ``max |A[rest] A[I]⁻¹| ≤ max_entry``, and the rest."""
    exchange = _Exchange(A, deim(A), blocks, run=1)
    exchange.improve(max_entry)
    return exchange.chosen, exchange.rest


def well_conditioned_pairs(
    A: torch.Tensor, blocks: Sequence[tuple[int, int]] | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same of rows ``2i, 2i + 1`` taken together, or None where single rows do better."""
    start = _pivot_pairs(A)
    if start is None:
        return None
    exchange = _Exchange(A, start, blocks, run=2)
    exchange.improve(_PAIR_VOLUME)
    return None if exchange.largest() > LARGEST_ENTRY else (exchange.chosen, exchange.rest)


def common_pivots(factors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """All rows ``(m,)``, first those that LU takes as pivots when it eliminates all factors side by
    side: for each column the open row with the largest product of entries. None where there is
    none but zero."""
    left = [A.clone() for A in factors]
    m = len(left[0])
    is_open = torch.ones(m, dtype=torch.bool, device=left[0].device)
    pivots = []
    for column in range(max(A.shape[1] for A in left)):
        active = [A for A in left if A.shape[1] > column]
        size = torch.stack([A[:, column].abs() for A in active]).prod(dim=0)
        row = int(torch.where(is_open, size, -1).argmax())
        if not size[row] > 0:
            return None
        is_open[row] = False
        pivots.append(row)
        for A in active:
            ahead, own = A[:, column + 1 :], A[row, column + 1 :].clone()
            ahead.addr_(A[:, column] / A[row, column], own, alpha=-1)
    rest = is_open.nonzero().squeeze(1)
    return torch.cat([torch.tensor(pivots, dtype=rest.dtype, device=rest.device), rest])


def swapped(factors: Sequence[torch.Tensor], sequence: torch.Tensor) -> torch.Tensor:
    """The sequence after swaps that let the product of all ``|det A_k[I_k]|`` grow.

    ``C_k = A_k A_k[I_k]⁻¹`` has its rows in the order of the sequence. Swapping rows ``i > j``
    changes ``det A_k[I_k]`` by the factor ``C_k[i, j]`` where ``j`` is in ``I_k`` and ``i`` is not,
    and leaves it alone elsewhere.
    """
    sequence = sequence.clone()
    C = [lstsq(A[sequence[: A.shape[1]]].mT, A[sequence].mT).mT for A in factors]
    width = max(one.shape[1] for one in C)
    gain = torch.empty(len(sequence), width, dtype=torch.float64, device=sequence.device)
    for _ in range(10 * width):  # a guard against rounding; the volumes are bounded
        gain.fill_(1)
        for one in C:
            rank = one.shape[1]
            gain[rank:, :rank] *= one[rank:].abs()
        i, j = divmod(int(gain.argmax()), width)
        if gain[i, j] <= _ORDER_VOLUME:
            break
        for one in C:
            _swap(one, i, j)
        sequence[[i, j]] = sequence[[j, i]]
    return sequence


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


def _swap(C: torch.Tensor, i: int, j: int) -> None:
    """``C = A A[I]⁻¹`` after rows ``i > j`` of ``A`` have changed places, in place."""
    rank = C.shape[1]
    if j < rank <= i:
        step = C[i].clone()
        pivot = step[j].clone()
        step[j] -= 1
        C.addr_(C[:, j] / pivot, step, alpha=-1)
    elif i < rank:  # both are in the skeleton
        C[:, [i, j]] = C[:, [j, i]]
    C[[i, j]] = C[[j, i]]
