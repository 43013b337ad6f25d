"""What makes a row or a column important: the matrix that a selection looks at.

Each function turns a weight ``W (m, n)`` and the second moment ``G`` of its inputs into a matrix of
the same shape. One function a score, chosen by the enum :class:`Score`.
"""

from __future__ import annotations

from enum import StrEnum

import torch

from cur_modifier.linalg.checks import (
    at_least_float32,
    require_finite,
    require_gram,
    require_matrix,
)
from cur_modifier.linalg.metric import apply_gram, gram_sqrt

__all__ = ["Score", "diag", "gram", "score", "wanda", "weight"]


class Score(StrEnum):
    """The scores by their names in a recipe."""

    WANDA = "wanda"
    GRAM = "gram"
    DIAG = "diag"
    WEIGHT = "weight"

    @property
    def needs_activations(self) -> bool:
        """Whether the score looks at calibration data."""
        return self is not Score.WEIGHT


def weight(W: torch.Tensor) -> torch.Tensor:
    """``W`` itself: no activations."""
    return W


def wanda(W: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """``|W| · diag(‖x_j‖)``: magnitude times the root mean square of each input.

    Source: Sun et al. 2024 (WANDA), used for selection by CURing. The absolute value discards the
    signs, so the singular vectors of this matrix are not those of any map the layer computes; use
    :func:`diag` to keep them.
    """
    return diag(W, second_moment).abs_()


def diag(W: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """``W · diag(G)^{1/2}``: wanda with its signs."""
    diagonal = second_moment if second_moment.ndim == 1 else second_moment.diagonal()
    return W * gram_sqrt(diagonal).to(W)


def gram(W: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """``W G^{1/2}``, whose best rank-``r`` approximation is the best one for the layer's output.

    Uses the symmetric root, the one closest to the identity, so that column ``j`` still stands for
    input ``j``. Cost: one ``eigh`` of ``(n, n)`` in float64.
    """
    return apply_gram(W, gram_sqrt(second_moment))


def score(kind: Score, W: torch.Tensor, second_moment: torch.Tensor | None) -> torch.Tensor:
    """The matrix ``(m, n)`` that ``kind`` selects on, in at least float32.

    Raises:
        ValueError: ``W`` or ``second_moment`` is not finite or does not fit, or the score needs
            activations and ``second_moment`` is None.
    """
    require_matrix(W, "the weight")
    require_finite(W, "the weight")
    W = at_least_float32(W)
    if kind is Score.WEIGHT:
        return weight(W)
    if second_moment is None:
        raise ValueError(
            f"score '{kind}' needs the second moment of the activations. "
            "Pass calibration data, or use the score 'weight'."
        )
    require_gram(second_moment, W.shape[1])
    match kind:
        case Score.WANDA:
            return wanda(W, second_moment)
        case Score.DIAG:
            return diag(W, second_moment)
        case Score.GRAM:
            return gram(W, second_moment)
