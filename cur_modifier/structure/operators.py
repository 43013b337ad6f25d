"""Modules that multiply by a matrix, however they store it."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["as_matrix"]


def as_matrix(module: nn.Module) -> torch.Tensor | None:
    """The weight ``(m, n)`` by which a module multiplies its inputs, as a view; None for others.

    A ``Conv1D`` of transformers stores it transposed. A convolution multiplies patches of
    ``n = channels × kernel`` numbers; one in groups multiplies by several matrices, and is none.
    """
    if isinstance(module, nn.Linear):
        return module.weight
    if isinstance(module, Conv1D):
        weight: torch.Tensor = module.weight
        return weight.T
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return module.weight.flatten(1)
    return None
