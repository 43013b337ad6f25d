"""Modules that multiply by a matrix, however they store it."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["as_matrix", "is_convolution", "matrix_of", "smaller"]


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


def is_convolution(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution of images that multiplies by one matrix."""
    return isinstance(module, nn.Conv2d) and module.groups == 1


def matrix_of(module: nn.Module) -> torch.Tensor:
    """The weight ``(m, n)`` of a module that has one, without gradients."""
    matrix = as_matrix(module)
    assert matrix is not None
    return matrix.detach()


def smaller(
    module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None
) -> nn.Linear | Conv1D | nn.Conv2d:
    """A module of the same kind, ``nn.Linear``, ``Conv1D`` or ``nn.Conv2d``, with another weight
    ``(m, n)``.

    Its dtype and device are those of the old weight.

    Args:
        bias: ``(m,)``, or None for a module without one. A ``Conv1D`` always has one.
    """
    m, n = weight.shape
    old = matrix_of(module)
    made: nn.Linear | Conv1D | nn.Conv2d
    if isinstance(module, Conv1D):
        made, stored = Conv1D(m, n), weight.T
    elif is_convolution(module):
        made = _convolution_like(module, n // module.weight[0, 0].numel(), m, bias is not None)
        stored = weight.reshape(made.weight.shape)
    else:
        with torch.device("meta"):
            made, stored = nn.Linear(n, m, bias=bias is not None), weight
    frozen = not module.weight.requires_grad
    made.weight = nn.Parameter(
        stored.detach().to(old).contiguous().clone(), requires_grad=not frozen
    )
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(old).clone(), requires_grad=not frozen)
    return made.train(module.training)


def _convolution_like(module: nn.Conv2d, channels: int, outputs: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(
        channels,
        outputs,
        module.kernel_size,  # type: ignore[arg-type]
        stride=module.stride,  # type: ignore[arg-type]
        padding=module.padding,  # type: ignore[arg-type]
        dilation=module.dilation,  # type: ignore[arg-type]
        padding_mode=module.padding_mode,
        bias=bias,
        device="meta",
    )
