"""Units of a layer, of which it answers the same in any order: what neurons and heads share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from cur_modifier.forms.base import FactoredLinear, is_factored
from cur_modifier.structure.readers import Call

__all__ = ["is_quantized", "linears_below", "unchanged_by"]

# Machine epsilons by which a function of one number may differ with its place in a vector.
_ROUNDING = 4.0


def linears_below(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Linear | FactoredLinear]:
    """The Linears of the layers by name, dense and factored; not the factors."""
    found: dict[str, nn.Linear | FactoredLinear] = {}
    for layer in layers:
        own = {
            f"{layer}.{name}": m
            for name, m in model.get_submodule(layer).named_modules()
            if isinstance(m, nn.Linear) or is_factored(m)
        }
        containers = tuple(f"{name}." for name, m in own.items() if is_factored(m))
        found |= {name: m for name, m in own.items() if not name.startswith(containers)}
    return found


def is_quantized(module: nn.Module) -> bool:
    """Whether an earlier stage quantized a module: its weight may not be permuted any more."""
    return getattr(module, "quantization_scheme", None) is not None


def unchanged_by(
    model: nn.Module,
    layer: str,
    orders: Mapping[str, torch.Tensor],
    consumer: tuple[str, torch.Tensor],
    calls: Mapping[str, Call],
) -> bool:
    """Whether a layer answers the same although the outputs of some modules are permuted.

    Args:
        orders: of the outputs, by the module's name: output ``order[i]`` comes ``i``-th.
        consumer: the module that is to read the same as before once its inputs are permuted back,
            and the order that they are permuted back from.
        calls: of the layer and the consumer, in whose context they can be called again.
    """
    name, order = consumer
    if not {layer, name} <= calls.keys():
        return False
    whole, reading = calls[layer], calls[name].args[0]
    read: list[torch.Tensor] = []

    def restore(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        read.append(args[0][..., order.argsort()])
        return (read[-1], *args[1:])

    with ExitStack() as stack:
        for producer, own in orders.items():
            handle = model.get_submodule(producer).register_forward_hook(_permuting(own))
            stack.callback(handle.remove)
        module = model.get_submodule(name)
        stack.callback(module.register_forward_pre_hook(restore).remove)
        answer = model.get_submodule(layer)(*whole.args, **whole.kwargs)
    return len(read) == 1 and _alike(read[0], reading) and _alike(answer, whole.output)


def _permuting(order: torch.Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output[..., order]

    return hook


def _alike(one: Any, other: Any) -> bool:
    one, other = (x[0] if isinstance(x, tuple) else x for x in (one, other))
    if not (torch.is_tensor(one) and torch.is_tensor(other) and one.shape == other.shape):
        return False
    limit = _ROUNDING * torch.finfo(one.dtype).eps
    return bool((one - other).double().norm() <= limit * other.double().norm())
