"""Rows that interpolate the others best, one after another."""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import require_finite, require_matrix, require_rank
from cur_modifier.linalg.gram import apply_gram

__all__ = ["greedy"]

# Gains are updated from step to step, and computed anew before rounding matters: after so many
# steps, or where all have become so small beside what they were.
_AFRESH_STEPS, _AFRESH_FALL = 256, 1e-6


def greedy(A: torch.Tensor, count: int, metric: torch.Tensor | None = None) -> torch.Tensor:
    """Indices ``(count,)`` of rows ``I`` of ``A (m, n)``, each the best to add to those before it.

    Best is what lowers ``min_X ‖M^{1/2} (A − X A[I])‖_F`` most. With ``E`` what the chosen rows
    leave of ``A``, adding row ``i`` lowers its square by ``‖M^{1/2} E Eᵢᵀ‖² / ‖Eᵢ‖²``. Where the
    chosen rows leave nothing, those of lowest index follow.

    Args:
        metric: ``M (m, m)``, positive semi-definite, or its diagonal ``(m,)``; the identity
            without.

    Cost: ``8 m n`` flops a row, ``2 m²`` with a full metric, and every 256 rows the less of
    ``4 m n²`` and ``2 m² n``, with a full metric of ``2 m n (m + 2 n)`` and ``2 m² (m + n)``;
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
    left = A.double().clone()
    M = left.new_ones(m) if metric is None else metric.to(left)
    require_finite(M, "the metric of the rows")
    nothing = torch.finfo(left.dtype).eps * left.square().sum(1)  # of a row: its own rounding
    chosen: list[int] = []
    free = torch.ones(m, dtype=torch.bool, device=A.device)
    gains, since, reference = left.new_zeros(m), _AFRESH_STEPS, 0.0
    for _ in range(count):
        if since == _AFRESH_STEPS or float(gains[free].max()) < _AFRESH_FALL * reference:
            gains = _gains(left, M)
            since, reference = 0, float(gains[free].max())
        since += 1
        lengths = left.square().sum(1)
        worth = torch.where(lengths > nothing, gains / lengths, 0)
        pick = int(torch.where(free, worth, -1).argmax())
        chosen.append(pick)
        free[pick] = False
        if worth[pick] <= 0:
            continue
        direction = left[pick] / lengths[pick].sqrt()
        share = left @ direction
        weighted = apply_gram(share, M)
        gains -= share * (2 * (left @ (left.mT @ weighted)) - share * (share @ weighted))
        left -= torch.outer(share, direction)
    return torch.tensor(chosen, device=A.device)


def _gains(E: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """``‖M^{1/2} E Eᵢᵀ‖²`` of every row ``i``, by ``Eᵀ M E`` or by ``E Eᵀ``: as takes less."""
    m, n = E.shape
    through_metric = m if M.ndim == 2 else 0
    if m * (n + through_metric) < n * (2 * n + through_metric):
        inner = E @ E.mT
        return (apply_gram(inner, M) * inner).sum(1)
    return ((E @ (apply_gram(E.mT, M) @ E)) * E).sum(1)
