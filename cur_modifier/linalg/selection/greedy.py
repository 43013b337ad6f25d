"""Rows that interpolate the others best, one after another."""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import require_finite, require_matrix, require_rank
from cur_modifier.linalg.metric import apply_gram

__all__ = ["greedy"]

# What the choice looks at is updated from step to step, and computed anew before rounding matters:
# after so many steps, or where all gains have become so small beside what they were. A row of which
# so little is left, in squares, waits for that.
_AFRESH_STEPS, _AFRESH_FALL, _WAITS = 256, 1e-6, 1e-8


def greedy(A: torch.Tensor, count: int, metric: torch.Tensor | None = None) -> torch.Tensor:
    """Indices ``(count,)`` of rows ``I`` of ``A (m, n)``, each the best to add to those before it.

    Best is what lowers ``min_X ‖M^{1/2} (A − X A[I])‖_F`` most. With ``E`` what the chosen rows
    leave of ``A``, adding row ``i`` lowers its square by ``‖M^{1/2} E Eᵢᵀ‖² / ‖Eᵢ‖²``. Where the
    chosen rows leave nothing, those of lowest index follow.

    Args:
        metric: ``M (m, m)``, positive semi-definite, or its diagonal ``(m,)``; the identity
            without.

    Cost: every 256 rows the less of ``2 m² n`` and ``4 m n²`` flops, with a full metric of
    ``2 m² (m + n)`` and ``2 m n (m + 2 n)``; a row ``2 m²`` more in the first case and ``6 m n`` in
    the second, and ``2 m²`` with a full metric. In the first case ``E Eᵀ`` is kept, ``m²`` numbers;
    float64.

    Source: Farahat, Ghodsi and Kamel 2011, whose criterion is here in a metric.

    Raises:
        ValueError: ``A`` or the metric is not finite or does not fit, or the count is outside
            ``1..m``.
    """
    require_matrix(A, "the matrix")
    require_finite(A, "the matrix")
    m = A.shape[0]
    require_rank(count, m, f"a matrix of {m} rows")
    if metric is not None and metric.shape not in {(m, m), (m,)}:
        raise ValueError(
            f"the metric of the rows has shape {tuple(metric.shape)}; expected ({m}, {m}) or its "
            f"diagonal ({m},)."
        )
    left = A.double()
    M = left.new_ones(m) if metric is None else metric.to(left)
    require_finite(M, "the metric of the rows")
    nothing = torch.finfo(left.dtype).eps * left.square().sum(1)  # of a row: its own rounding
    free = torch.ones(m, dtype=torch.bool, device=A.device)
    chosen: list[int] = []
    while len(chosen) < count:
        # Takes those that it chooses from the free ones.
        some = _choose(left, M, free, nothing, min(count - len(chosen), _AFRESH_STEPS))
        if not some:
            break
        chosen += some
        if len(chosen) < count:
            basis = torch.linalg.qr(left[some].mT).Q
            left = left - (left @ basis) @ basis.mT
    rest = free.nonzero().flatten().tolist()
    return torch.tensor(chosen + rest[: count - len(chosen)], device=A.device)


def _choose(
    E: torch.Tensor, M: torch.Tensor, free: torch.Tensor, nothing: torch.Tensor, count: int
) -> list[int]:
    """At most ``count`` of the ``free`` rows, as many as can be told without computing ``E`` anew.

    With ``F`` of a column ``E Eᵢᵀ / ‖Eᵢ‖`` for each chosen row, what they leave has the products
    ``E Eᵀ − F Fᵀ``: ``E`` itself need not be written again and again.
    """
    m, n = E.shape
    through_metric = m if M.ndim == 2 else 0
    small = m * (n + through_metric) < n * (2 * n + through_metric)
    inner = E @ E.mT if small else None
    if inner is not None:
        gains = (apply_gram(inner, M) * inner).sum(1)
    else:
        gains = ((E @ (apply_gram(E.mT, M) @ E)) * E).sum(1)
    lengths = E.square().sum(1)
    least = torch.maximum(_WAITS * lengths, nothing)
    F = E.new_zeros(m, count)
    reference = float(torch.where(free, gains, 0).max())
    chosen: list[int] = []
    for step in range(count):
        able = free & (lengths > least)
        worth = torch.where(able, gains / lengths, 0)
        pick = int(worth.argmax())
        fallen = float(torch.where(free, gains, 0).max()) < _AFRESH_FALL * reference
        if worth[pick] <= 0 or (fallen and chosen):
            break
        chosen.append(pick)
        free[pick] = False
        before = F[:, :step]
        column = (E @ E[pick] if inner is None else inner[:, pick]) - before @ before[pick]
        share = column / lengths[pick].sqrt()
        weighted = apply_gram(share, M)
        product = E @ (E.mT @ weighted) if inner is None else inner @ weighted
        product -= before @ (before.mT @ weighted)
        gains -= share * (2 * product - share * (share @ weighted))
        lengths -= share.square()
        F[:, step] = share
    return chosen
