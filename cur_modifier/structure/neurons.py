"""Neurons of MLPs: features that can be put in any order, which makes a row ID's outputs free to
serve.

``down(act(gate x) ⊙ (up x))`` stays what it is when the outputs of gate and up and the inputs of
down are permuted alike. A row ID computes its skeleton's outputs first; where neurons are in that
sequence, its products, side by side, are the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from compressed_tensors.offload import update_offload_parameter
from torch import nn

from cur_modifier.forms.base import FactoredLinear, is_factored
from cur_modifier.structure.readers import Call, called_once, recorded
from cur_modifier.structure.units import is_quantized, linears_below, unchanged_by

__all__ = ["Neurons", "find_neurons", "put_in_order"]


@dataclass(frozen=True)
class Neurons:
    """Linears by name: the ``producers`` give each neuron a value or more, one the ``consumer``
    reads of it. Nothing else does."""

    layer: str
    producers: tuple[str, ...]
    consumer: str


def find_neurons(
    model: nn.Module,
    layers: Sequence[str],
    wanted: AbstractSet[str],
    run: Callable[[], None],
) -> list[Neurons]:
    """The neurons whose producers include one of the modules ``wanted``.

    Found by trying, not by names: in a forward pass of a few tokens the Linears are noted that read
    one tensor and have equally many outputs, and those with as many inputs. A layer that then
    answers the same although the outputs of the former are permuted, and the inputs of the latter
    permuted back, has neurons there. Experts that no token of the trial reaches, Linears that run
    several times and those that an earlier stage quantized are not looked at.

    Args:
        layers: names of the decoder layers to look at.
        run: the forward pass, in whose context modules can be called again as they were.

    Cost: the forward pass, and another through the layers.
    """
    found: list[Neurons] = []
    if not layers:
        return found
    linears = linears_below(model, layers)
    with recorded(model, [*linears, *layers]) as every_call:
        run()
    calls = called_once(every_call)
    for layer in layers:
        ran = [n for n in calls if n.startswith(f"{layer}.") and not is_quantized(linears[n])]
        for producers in _side_by_side(ran, linears, calls):
            if not wanted.isdisjoint(producers):
                found += _neurons_of(model, layer, producers, ran, linears, calls)[:1]
    return found


def put_in_order(model: nn.Module, neurons: Sequence[Neurons], run: Callable[[], None]) -> int:
    """Put neurons in the sequence in which the factored layers among their producers compute them.

    Exact: rows and columns change places, and dense layers that were kept to learn from follow.
    Where factored layers disagree about the order, or the layer no longer answers the same (a norm
    between producers and consumer was trained), all stays as it is.

    Args:
        run: as for :func:`find_neurons`.

    Returns:
        How many of ``neurons`` were put in order.

    Cost: as :func:`find_neurons`, and a copy of the consumers' weights.
    """
    if not neurons:
        return 0
    done = 0
    names = dict.fromkeys(n for each in neurons for n in (each.layer, each.consumer))
    with recorded(model, list(names)) as every_call:
        run()
    calls = called_once(every_call)
    for each in neurons:
        producers = [model.get_submodule(name) for name in each.producers]
        sequence = _common_sequence(producers)
        if sequence is None or not _is_free(model, each, calls):
            continue
        for producer in producers:
            _reorder(producer, outputs=sequence)
        _reorder(model.get_submodule(each.consumer), inputs=sequence)
        done += 1
    return done


def _side_by_side(
    names: Sequence[str],
    linears: Mapping[str, nn.Linear | FactoredLinear],
    calls: Mapping[str, Call],
) -> list[tuple[str, ...]]:
    """Those of the dense Linears together that read one tensor and have equally many outputs."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in names:
        if is_factored(linears[name]):
            continue
        key = (calls[name].tensor, linears[name].out_features)
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values()]


def _neurons_of(
    model: nn.Module,
    layer: str,
    producers: tuple[str, ...],
    ran: Sequence[str],
    linears: Mapping[str, nn.Linear | FactoredLinear],
    calls: Mapping[str, Call],
) -> list[Neurons]:
    """The neurons that have these producers, by their consumer."""
    width = calls[producers[0]].output.shape[-1]
    trials = (
        Neurons(layer, producers, reader)
        for reader in ran[ran.index(producers[-1]) + 1 :]
        if linears[reader].in_features == width
    )
    return [trial for trial in trials if _is_free(model, trial, calls)]


def _is_free(model: nn.Module, neurons: Neurons, calls: Mapping[str, Call]) -> bool:
    """Whether the consumer and the layer see the same whatever the order of the neurons."""
    if neurons.consumer not in calls:
        return False
    reading = calls[neurons.consumer].args[0]
    order = torch.randperm(reading.shape[-1], generator=torch.Generator().manual_seed(0))
    order = order.to(reading.device)
    orders = dict.fromkeys(neurons.producers, order)
    return unchanged_by(model, neurons.layer, orders, (neurons.consumer, order), calls)


def _common_sequence(producers: Sequence[nn.Module]) -> torch.Tensor | None:
    """The outputs in the order in which the factored layers compute them; None where that is no
    matter of one order, or where they are in it already."""
    factored = [p for p in producers if is_factored(p)]
    sequences = [p.output_sequence for p in factored if p.dense is None]
    ready = len(sequences) == len(factored) > 0
    if not ready or any(
        s is None or sequences[0] is None or not torch.equal(s, sequences[0]) for s in sequences
    ):
        return None
    first = sequences[0]
    assert first is not None
    straight = torch.arange(len(first), device=first.device)
    return None if torch.equal(first, straight) else first


def _reorder(
    module: nn.Module,
    *,
    inputs: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
) -> None:
    """Permute a module, dense or factored, and the dense layers that answer for it or teach it."""
    if is_factored(module):
        if module.dense is None and outputs is not None:
            module.reorder_outputs(outputs, write=update_offload_parameter)
        if module.dense is None and inputs is not None:
            module.reorder_inputs(inputs, write=update_offload_parameter)
        linears = {linear for linear in (module.dense, module.teacher) if linear is not None}
    else:
        assert isinstance(module, nn.Linear)
        linears = {module}
    for linear in linears:
        if outputs is not None:
            update_offload_parameter(linear, "weight", linear.weight.detach()[outputs])
            if linear.bias is not None:
                update_offload_parameter(linear, "bias", linear.bias.detach()[outputs])
        if inputs is not None:
            update_offload_parameter(linear, "weight", linear.weight.detach()[:, inputs])
