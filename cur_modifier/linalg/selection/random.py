"""Rows at random: the control."""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import require_rank

__all__ = ["random"]


def random(length: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` of ``length`` indices, uniformly without replacement: the control."""
    require_rank(count, length, f"{length} rows")
    return torch.randperm(length, generator=generator)[:count]
