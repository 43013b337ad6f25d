"""What published pruning methods look at: sub-layers of an encoder, their masks, what they add.

A sub-layer is attention or an MLP with its residual connection. Its units are heads or neurons, its
consumer the last matrix. The methods that prune without training see the model as sub-layers in
order, each with a mask over its units, and tune a sub-layer until its output with the residual is
what the dense model has there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from cur_modifier.linalg import kept_features
from cur_modifier.modifiers.prune.budget import Costs, costs_of
from cur_modifier.passes.context import trial
from cur_modifier.passes.samples import real_rows, real_tokens
from cur_modifier.structure.layers import decoder_layers
from cur_modifier.structure.removal import Units
from cur_modifier.structure.search import find_units
from mlflow_projects.reproduce.masks import Batch, ReachedError, Settled, inputs_of

__all__ = [
    "columns_of",
    "densest",
    "outputs_of",
    "reading",
    "sublayers",
]


def sublayers(model: Any, sequence_length: int) -> tuple[list[Units], Costs]:
    """Heads and neurons of every layer in the order of execution, and their multiply-accumulates.

    Raises:
        ValueError: a layer lacks one of them.
    """
    layers = [name for name, _ in decoder_layers(model)]
    with trial(model) as run:
        units = find_units(model, layers, ["heads", "neurons"], run)
    if len(units) != 2 * len(layers):
        raise ValueError(
            f"{type(model).__name__}: {len(units)} sub-layers of {len(layers)} layers have units "
            "that can be removed; the published methods want attention and an MLP in each."
        )
    return units, costs_of(model, units, "macs", sequence_length)


@torch.no_grad()
def reading(
    model: Any, units: Units, batches: Sequence[Batch], settled: Settled
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(tokens, n)`` that the consumer reads, and ``(tokens, m)`` that the residual connection
    adds to what it answers; without padding."""
    pairs = list(_reading(model, units, batches, settled))
    return torch.cat([h for h, _ in pairs]), torch.cat([r for _, r in pairs])


@torch.no_grad()
def outputs_of(
    model: Any, units: Sequence[Units], batches: Sequence[Batch]
) -> dict[str, torch.Tensor]:
    """``(tokens, m)`` of every sub-layer by the consumer's name, residual included: what it hands
    to its norm; without padding.

    Raises:
        ValueError: no norm reads that sum, as where norms stand in front of sub-layers.
    """
    found: dict[str, list[torch.Tensor]] = {each.consumer: [] for each in units}
    residuals: dict[str, torch.Tensor] = {}
    read: list[torch.Tensor] = []
    real: torch.Tensor | None = None

    def entering(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            residuals[name] = args[0]

        return hook

    def leaving(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            found[name].append(real_rows(out + residuals[name], real))

        return hook

    def looking(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and torch.is_tensor(args[0]) and args[0].ndim == 3:
            read.append(args[0])

    with ExitStack() as stack:
        for each in units:
            producer, consumer = _ends(model, each)
            enter, leave = entering(each.consumer), leaving(each.consumer)
            stack.callback(producer.register_forward_pre_hook(enter).remove)
            stack.callback(consumer.register_forward_hook(leave).remove)
        for number, batch in enumerate(batches):
            real = real_tokens(batch)
            with ExitStack() as first:
                if not number:
                    for module in model.modules():
                        first.callback(module.register_forward_pre_hook(looking).remove)
                model(**inputs_of(batch))
            if not number:
                _require_norms(found, [real_rows(x, real) for x in read])
    return {name: torch.cat(parts) for name, parts in found.items()}


def _require_norms(found: Mapping[str, list[torch.Tensor]], read: Sequence[torch.Tensor]) -> None:
    for name, (output,) in found.items():
        if not any(
            x.shape == output.shape and torch.allclose(x, output, rtol=1e-4, atol=1e-4)
            for x in read
        ):
            raise ValueError(
                f"{name}: no module reads its output with the residual added. The published "
                "methods are written for encoders with norms behind sub-layers."
            )


def densest(
    scores: Sequence[torch.Tensor], costs: Sequence[int], budget: float
) -> list[torch.Tensor]:
    """Units to keep of each sub-layer: those of the largest score for their cost, while the budget
    lasts. Each sub-layer keeps its best unit at least: a layer without heads can't be built.

    Args:
        scores: ``(units,)`` of each sub-layer.
        costs: of one unit of each.

    Raises:
        ValueError: one unit for each is more than the budget.
    """
    best = [int(score.argmax()) for score in scores]
    left = budget - sum(costs)
    if left < 0:
        raise ValueError(
            f"one unit for each of {len(scores)} sub-layers costs {sum(costs)}, more than the "
            f"{budget:.0f} that the budget allows. Raise it."
        )
    masks = [torch.zeros(len(score), dtype=torch.bool) for score in scores]
    for mask, unit in zip(masks, best, strict=True):
        mask[unit] = True
    worth = torch.cat([score / cost for score, cost in zip(scores, costs, strict=True)])
    places = [(sub, unit) for sub, score in enumerate(scores) for unit in range(len(score))]
    for place in worth.argsort(descending=True, stable=True).tolist():
        sub, unit = places[place]
        if masks[sub][unit]:
            continue
        if costs[sub] > left:
            break
        masks[sub][unit] = True
        left -= costs[sub]
    return [mask.nonzero().flatten() for mask in masks]


def columns_of(units: Units, kept: torch.Tensor, total: int) -> torch.Tensor:
    """The consumer's inputs that belong to the kept units, or to none."""
    return kept_features(units.reads, kept, total)


def _reading(
    model: Any, units: Units, batches: Sequence[Batch], settled: Settled
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    held: dict[str, torch.Tensor] = {}

    def first(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        held["residual"] = args[0]

    def last(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        held["h"] = args[0]
        raise ReachedError

    producer, consumer = _ends(model, units)
    with ExitStack() as stack:
        stack.callback(producer.register_forward_pre_hook(first).remove)
        stack.callback(consumer.register_forward_pre_hook(last).remove)
        for number, batch in enumerate(batches):
            with settled.passing(number), suppress(ReachedError):
                model(**inputs_of(batch))
            real = real_tokens(batch)
            yield real_rows(held["h"], real), real_rows(held["residual"], real)


def _ends(model: Any, units: Units) -> tuple[Any, Any]:
    """The first producer and the consumer. Where norms stand behind sub-layers, what the former
    reads is what the residual connection adds to what the latter answers."""
    return (
        model.get_submodule(next(iter(units.producers))),
        model.get_submodule(units.consumer),
    )
