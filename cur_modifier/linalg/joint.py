"""Row IDs that share one skeleton: the parts of a row ID of stacked weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cur_modifier.linalg.decomposition import low_rank
from cur_modifier.linalg.forms import RowID
from cur_modifier.linalg.selection import deim

__all__ = ["apportion", "skeleton_shares", "split_rows"]


def split_rows(joint: RowID, sizes: Sequence[int]) -> list[RowID]:
    """A row ID of stacked weights ``[W_1; W_2; …] (m, n)`` as the row IDs of its blocks.

    All parts hold the same tensor ``S (r, n)``. Part ``k`` with ``m_k`` outputs owns ``c_k`` of its
    rows as outputs; it has ``T (m_k − c_k, r)``, the rows of the joint ``T`` for its other outputs,
    in the order of the outputs, and ``order (m_k,)``. The products of the parts, stacked, are the
    joint product. Stored once, ``S`` and all ``T`` are the ``r (m + n − r)`` numbers of the joint
    form.

    Args:
        sizes: ``m_k`` of every block, top to bottom.

    Cost: a copy of ``T``.

    Raises:
        ValueError: the sizes are not positive, or their sum is not ``m``.
    """
    m = joint.shape[0]
    if not sizes or min(sizes) < 1 or sum(sizes) != m:
        raise ValueError(
            f"blocks of {list(sizes)} rows do not stack to the {m} rows of the joint weight. Give "
            "the number of outputs of every block, in the order in which they were stacked."
        )
    parts = []
    for order in joint.order.split(list(sizes)):
        interpolated = order >= joint.rank
        T = joint.T[order[interpolated] - joint.rank]
        place = joint.rank + interpolated.cumsum(0) - 1
        parts.append(RowID(S=joint.S, T=T, order=torch.where(interpolated, place, order)))
    return parts


def skeleton_shares(
    W: torch.Tensor,
    rank: int,
    sizes: Sequence[int],
    *,
    multiple_of: int = 1,
    outputs: torch.Tensor | None = None,
) -> list[int]:
    """How many rows of a joint skeleton each block of ``W = [W_1; W_2; …] (m, n)`` best gives.

    The number of pivots that each has in the LU of the optimal rank-``r`` approximation of ``W``,
    rounded by :func:`apportion`: what to fix before the activations are known.

    Args:
        sizes: ``m_k`` of every block, top to bottom.
        outputs: metric ``H`` of the stacked outputs, as for :func:`low_rank`.

    Cost: that of :func:`low_rank` without ``gram``, and ``m r²`` flops.

    Raises:
        ValueError: as :func:`low_rank` and :func:`apportion`.
    """
    pivots = deim(low_rank(W, rank, outputs=outputs).A)
    ends = torch.tensor(list(sizes), device=pivots.device).cumsum(0)
    block = torch.bucketize(pivots, ends, right=True)
    found = torch.bincount(block, minlength=len(sizes)).tolist()
    return apportion(found, sizes, rank, multiple_of=multiple_of)


def apportion(
    shares: Sequence[int], sizes: Sequence[int], total: int, *, multiple_of: int = 1
) -> list[int]:
    """Whole numbers in proportion to ``shares`` that add up to ``total``, each at most its size.

    They are multiples of ``multiple_of`` where such numbers exist. By largest remainders.

    Raises:
        ValueError: the total is above the sum of the sizes, or ``shares`` are not one each, with a
            positive sum.
    """
    if len(shares) != len(sizes) or sum(shares) < 1 or not 0 <= total <= sum(sizes):
        raise ValueError(
            f"{total} rows can't be shared as {list(shares)} among blocks of {list(sizes)} rows. "
            "Give one share a block, and at most as many rows as the blocks have."
        )
    fits = sum(size // multiple_of for size in sizes) * multiple_of >= total
    unit = multiple_of if fits and total % multiple_of == 0 else 1
    wanted = [share * total / sum(shares) for share in shares]
    given = [min(int(w // unit), size // unit) for w, size in zip(wanted, sizes, strict=True)]
    for _ in range(total // unit - sum(given)):
        open_to = [k for k, size in enumerate(sizes) if given[k] < size // unit]
        given[max(open_to, key=lambda k: wanted[k] - unit * given[k])] += 1
    return [unit * count for count in given]
