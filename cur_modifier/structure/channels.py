"""Channels of convolutions, as they may lie between a convolution and the module that reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from cur_modifier.structure.layers import below
from cur_modifier.structure.operators import is_convolution, matrix_of
from cur_modifier.structure.readers import Call
from cur_modifier.structure.removal import Units

__all__ = ["channel_layouts", "norms_below", "staying"]


def norms_below(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.BatchNorm2d]:
    """The batch norms of the layers by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and name.startswith(tuple(map(below, layers)))
    }


def channel_layouts(
    layer: str,
    ran: Sequence[str],
    matrices: Mapping[str, nn.Module],
    norms: Mapping[str, nn.BatchNorm2d],
    calls: Mapping[str, Call],
) -> Iterator[Units]:
    """Layouts that fit the sizes: a convolution, a later module that reads as many channels, and
    the batch norms that run between.

    A Linear behind a flattening reads of each channel as many features as it has pixels. Modules
    that run soon after the producer come first, and with them the batch norms that read it.

    Args:
        ran: names of the modules that ran, in their order.
        matrices, norms: of those, by name.
    """
    for place, producer in enumerate(ran):
        module = matrices.get(producer)
        if not is_convolution(module):
            continue
        channels = module.out_channels
        produced = {producer: torch.arange(channels)[:, None]}
        between: list[str] = []
        for name in ran[place + 1 :]:
            if name in norms:
                if norms[name].num_features == channels:
                    between.append(name)
            elif name in matrices and (reads := _reads(matrices[name], channels)) is not None:
                direct = tuple(n for n in between if calls[n].args[0] is calls[producer].output)
                for chosen in dict.fromkeys((direct, tuple(between), ())):
                    yield Units(layer, "channels", produced, name, reads, norms=chosen)


def staying(model: nn.Module, layers: Sequence[str], found: Sequence[Units]) -> dict[str, str]:
    """Why no output channel of a convolution can be removed, by its name."""
    producers = {name for units in found for name in units.producers}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or name in producers:
            continue
        if not name.startswith(tuple(map(below, layers))):
            reasons[name] = "it is outside the blocks"
        elif module.groups > 1:
            reasons[name] = f"it has {module.groups} groups, whose channels go together"
        else:
            reasons[name] = "a residual sum, a concatenation or several readers tie its channels"
    return reasons


def _reads(consumer: nn.Module, channels: int) -> torch.Tensor | None:
    """``(channels, w)``: which inputs of a consumer's matrix are of each channel, if it fits."""
    inputs = matrix_of(consumer).shape[1]
    if is_convolution(consumer) and consumer.in_channels != channels:
        return None
    return torch.arange(inputs).view(channels, -1) if inputs % channels == 0 else None
