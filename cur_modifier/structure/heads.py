"""Heads of attention: blocks of features that can be put in any order together.

The outputs of q, k and v and the inputs of o fall into as many blocks as there are key/value heads;
a block of q holds the query heads of one key/value head. Attention answers the same when the blocks
of all four are permuted alike, and not when the features within are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cur_modifier.structure.readers import Call, called_once, recorded
from cur_modifier.structure.units import is_quantized, linears_below, unchanged_by

__all__ = ["Heads", "block_order", "find_heads"]

# Machine epsilons by which attention may differ with the place of a head in a batch of products.
_ROUNDING = 64.0


@dataclass(frozen=True)
class Heads:
    """Linears by name: the ``producers`` (q, k, v) give ``groups`` blocks of outputs each, which
    the ``consumer`` (o) reads as as many blocks of inputs."""

    layer: str
    producers: tuple[str, ...]
    consumer: str
    groups: int


def find_heads(model: nn.Module, layers: Sequence[str], run: Callable[[], None]) -> list[Heads]:
    """The heads of the layers.

    Found by trying, in a forward pass of a few tokens: Linears that read one tensor, and a later
    one of which the widths fall into the blocks that the config names. Projections that are fused
    in one Linear, and attention that another module of the layer looks into, are not found.

    Args:
        layers: names of the layers to look at.
        run: the forward pass, in whose context modules can be called again as they were.

    Cost: the forward pass, and two more through the layers for each pair of widths that fit.
    """
    groups = _groups(model)
    if groups is None or groups < 2 or not layers:
        return []
    linears = linears_below(model, layers)
    with recorded(model, [*linears, *layers]) as every_call:
        run()
    calls = called_once(every_call)
    found: list[Heads] = []
    for layer in layers:
        ran = [n for n in calls if n.startswith(f"{layer}.") and not is_quantized(linears[n])]
        trials = (
            Heads(layer, producers, consumer, groups)
            for producers in _reading_together(ran, calls)
            for consumer in ran[ran.index(producers[-1]) + 1 :]
            if _fit(producers, consumer, groups, linears)
        )
        found += [trial for trial in trials if _are_heads(model, trial, calls)][:1]
    return found


def block_order(order: torch.Tensor, width: int) -> torch.Tensor:
    """The order ``(width,)`` of single features, given that of the blocks ``(groups,)`` that they
    form."""
    features = torch.arange(width, device=order.device).view(len(order), -1)
    return features[order].flatten()


def _groups(model: Any) -> int | None:
    """Key/value heads, as the config of the text model has them."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    groups: int | None = getattr(config, "num_key_value_heads", None) or heads
    return groups


def _reading_together(names: Sequence[str], calls: Mapping[str, Call]) -> list[tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(calls[name].tensor, []).append(name)
    return [tuple(group) for group in groups.values() if len(group) == 3]


def _fit(producers: Sequence[str], consumer: str, groups: int, linears: Mapping[str, Any]) -> bool:
    widths = [linears[name].out_features for name in producers]
    read = linears[consumer].in_features
    return read in widths and not any(width % groups for width in (*widths, read))


def _are_heads(model: nn.Module, trial: Heads, calls: Mapping[str, Call]) -> bool:
    generator = torch.Generator().manual_seed(0)
    reading = calls[trial.consumer].args[0]
    blocks = torch.randperm(trial.groups, generator=generator)
    if bool((blocks.diff() == 1).all()):
        blocks = blocks.flip(0)
    widths = {name: calls[name].output.shape[-1] for name in trial.producers}

    def holds(order_of: Callable[[int], torch.Tensor]) -> bool:
        orders = {name: order_of(width).to(reading.device) for name, width in widths.items()}
        consumer = (trial.consumer, order_of(reading.shape[-1]).to(reading.device))
        return unchanged_by(model, trial.layer, orders, consumer, calls, rounding=_ROUNDING)

    def across_blocks(width: int) -> torch.Tensor:
        return torch.arange(width).view(trial.groups, -1).T.flatten()

    # Neurons keep their answer in any order; heads do not where features leave their block.
    return holds(lambda width: block_order(blocks, width)) and not holds(across_blocks)
