"""What modules multiply and answer, as rows: a convolution multiplies patches of its input.

A token, or a position of an image, is a row. With :func:`~.operators.matrix_of` as ``W`` and rows
``x`` of what a module reads, ``x Wᵀ`` are the rows that it answers, but for the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cur_modifier.structure.operators import is_convolution
from cur_modifier.structure.readers import recorded

__all__ = ["POSITIONS", "count_positions", "rows_answered", "rows_read"]

_MULTIPLYING = (nn.Linear, Conv1D, nn.Conv2d)

POSITIONS = 256
"""Positions of an image whose patches are looked at: neighbours overlap, and tell little new."""


def rows_read(
    module: nn.Module, *inputs: torch.Tensor, seed: int, most: int = POSITIONS
) -> Iterator[tuple[torch.Tensor, ...]]:
    """What a convolution multiplies, image by image: patches ``(t, channels · kernel)``.

    Of other modules the inputs themselves, once.

    Args:
        inputs: what the module reads, ``(images, channels, height, width)`` of a convolution; of
            all the same positions are taken.
        seed: where there are more than ``most`` positions in an image, of their choice.

    Cost: memory of ``most`` patches.
    """
    if not is_convolution(module):
        yield inputs
        return
    views = [_patches(module, x) for x in inputs]
    height, width = views[0].shape[1:3]
    positions = torch.arange(height * width, device=inputs[0].device)
    for image in range(len(inputs[0])):
        chosen = positions
        if len(positions) > most:
            generator = torch.Generator().manual_seed(seed << 16 | image)
            order = torch.randperm(len(positions), generator=generator)[:most]
            chosen = order.sort().values.to(positions)
        rows, columns = chosen // width, chosen % width
        yield tuple(view[image, rows, columns].flatten(1) for view in views)


def rows_answered(module: nn.Module, out: torch.Tensor) -> torch.Tensor:
    """``(..., m)``: what a module answers, with the outputs of its matrix as the last dimension."""
    return out.movedim(1, -1) if isinstance(module, nn.Conv2d) else out


def count_positions(model: nn.Module, run: Callable[[], None]) -> dict[str, int]:
    """How many rows each Linear, ``Conv1D`` and convolution of images answers in a forward pass, by
    name, all its calls together. Of those that do not run there is no entry."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, _MULTIPLYING)}
    with recorded(model, list(modules)) as calls:
        run()
    found = {}
    for name, module in modules.items():
        outs = [rows_answered(module, call.output) for call in calls.get(name, [])]
        if outs:
            found[name] = sum(prod(out.shape[:-1]) for out in outs)
    return found


def _patches(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """``(images, height, width, channels, *kernel)``, a view of the padded input."""
    mode = module.padding_mode
    padded = nn.functional.pad(
        x, module._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode
    )
    for axis, (size, stride, step) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        padded = padded.unfold(axis, (size - 1) * step + 1, stride)[..., ::step]
    return padded.permute(0, 2, 3, 1, 4, 5)
