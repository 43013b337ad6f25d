"""Row IDs of several weights whose outputs come in one order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cur_modifier.linalg.compact import LARGEST_ENTRY, require_row_id, row_id
from cur_modifier.linalg.forms import LowRank, RowID
from cur_modifier.linalg.subspace import lstsq

__all__ = ["aligned"]

# Rows are swapped for a product of volumes this many times larger.
_VOLUME = 1.1


def aligned(pairs: Sequence[LowRank]) -> list[RowID] | None:
    """Low-rank pairs with equally many outputs as row IDs of one ``order``, without loss.

    Of one sequence of the ``m`` rows the first ``r_k`` are the skeleton of pair ``k``, so skeletons
    of different ranks are nested. Where the outputs of all pairs are features that can be put in
    any order together, as the neurons of an MLP, they are put in that sequence, and nothing is left
    to be gathered when the model runs.

    The sequence starts from LU pivots that are large in all left factors ``A_k`` at once, and rows
    are swapped while the product of all ``|det A_k[I_k]|`` grows. On SmolLM2's gate and up (layers
    0, 5, 20, 29) that leaves ``max |T|`` between 1.5 and 3.7, and pivots of each one's own between
    1.7 and 3.6; the norms of T's rows are within a ninth of each other.

    Returns:
        The row IDs, or None where some ``A_k`` has no full rank or an entry of some ``T`` is above
        8, which would cancel in low precision.

    Cost: for each pair ``2 m r²`` flops, and ``2 m r`` a swap.

    Raises:
        ValueError: no pairs, or of different numbers of outputs; a factor is not finite or wide.
    """
    _require_alike(pairs)
    factors = [pair.A.double() for pair in pairs]
    sequence = _common_pivots(factors)
    if sequence is None:
        return None
    sequence = _swapped(factors, sequence)
    found = [row_id(pair, *sequence.tensor_split([pair.A.shape[1]])) for pair in pairs]
    entries = [float(one.T.abs().max()) for one in found if one.T.numel()]
    return None if max(entries, default=0.0) > LARGEST_ENTRY else found


def _require_alike(pairs: Sequence[LowRank]) -> None:
    heights = {len(pair.A) for pair in pairs}
    if len(heights) != 1:
        raise ValueError(
            f"got {len(pairs)} pairs with {sorted(heights)} outputs; one order needs at least one "
            "pair, and equally many outputs in all of them."
        )
    for pair in pairs:
        require_row_id(pair)


def _common_pivots(factors: Sequence[torch.Tensor]) -> torch.Tensor | None:
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


def _swapped(factors: Sequence[torch.Tensor], sequence: torch.Tensor) -> torch.Tensor:
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
        if gain[i, j] <= _VOLUME:
            break
        for one in C:
            _swap(one, i, j)
        sequence[[i, j]] = sequence[[j, i]]
    return sequence


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
