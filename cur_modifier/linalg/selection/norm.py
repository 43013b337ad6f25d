"""Rows by their length."""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import (
    at_least_float32,
    require_finite,
    require_matrix,
    require_rank,
)
from cur_modifier.linalg.selection.basis import largest

__all__ = ["norm"]


def norm(A: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` rows of ``A (m, n)`` of largest Euclidean norm, ties by index."""
    require_matrix(A, "the scored matrix")
    require_finite(A, "the scored matrix")
    require_rank(count, A.shape[0], f"a matrix of {A.shape[0]} rows")
    return largest(torch.linalg.vector_norm(at_least_float32(A), dim=1), count)
