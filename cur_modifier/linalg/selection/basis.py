"""What selections on an orthonormal basis share."""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import require_finite, require_matrix

__all__ = ["largest", "require_basis"]


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices ``(count,)`` of the largest values, ties by index."""
    return torch.sort(values, descending=True, stable=True).indices[:count]


def require_basis(V: torch.Tensor) -> None:
    """Raises:
    ValueError: ``V (m, r)`` is wide, or not finite.
    """
    require_matrix(V, "the basis")
    require_finite(V, "the basis")
    if V.shape[1] > V.shape[0]:
        raise ValueError(
            f"the basis has shape {tuple(V.shape)}; expected at least as many rows as columns. "
            "Pass the transpose."
        )
