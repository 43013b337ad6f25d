"""Row IDs that share one skeleton: the parts of a row ID of stacked weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cur_modifier.linalg.forms import RowID

__all__ = ["split_rows"]


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
