"""Neurons of MLPs: features that can be put in any order, which makes a row ID's outputs free to
serve.

``down(act(gate x) ⊙ (up x))`` stays what it is when the outputs of gate and up and the inputs of
down are permuted alike. A row ID computes its skeleton's outputs first; where neurons are in that
sequence, its products, side by side, are the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.offload import update_offload_parameter
from torch import nn

from cur_modifier.factored import CURLinear, FactoredLinear, InterpolativeLinear
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.plan import Candidate

__all__ = ["Neurons", "find_neurons", "put_in_order"]

# Machine epsilons by which a function of one number may differ with its place in a vector.
_ROUNDING = 4


@dataclass(frozen=True)
class Neurons:
    """Linears by name: the ``producers`` give each neuron a value or more, one the ``consumer``
    reads of it. Nothing else does."""

    layer: str
    producers: tuple[str, ...]
    consumer: str


@dataclass(frozen=True)
class _Call:
    """What a module was given, and what it answered."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def find_neurons(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]], candidates: Sequence[Candidate]
) -> list[Neurons]:
    """The neurons whose producers include one of the candidates.

    Found by trying, not by names: in a forward pass of a few tokens the Linears are noted that read
    one tensor and have equally many outputs, and those with as many inputs. A layer that then
    answers the same although the outputs of the former are permuted, and the inputs of the latter
    permuted back, has neurons there. Experts that no token of the trial reaches, Linears that run
    several times and those that an earlier stage quantized are not looked at.

    Args:
        candidates: what will be a row ID with a skeleton of free choice and of its own.

    Cost: a forward pass of a few tokens, and another through the layers of the candidates.
    """
    wanted = {candidate.name for candidate in candidates}
    held = [layers[index] for index in sorted({candidate.layer for candidate in candidates})]
    linears = {
        f"{layer}.{name}": module for layer, parent in held for name, module in _linears(parent)
    }
    found: list[Neurons] = []
    if not held:
        return found
    with _watching(model, [*linears, *(name for name, _ in held)]) as calls:
        for layer, _ in held:
            ran = [n for n in calls if n.startswith(f"{layer}.") and not _quantized(linears[n])]
            for producers in _side_by_side(ran, linears, calls):
                if wanted.isdisjoint(producers):
                    continue
                m = linears[producers[0]].out_features
                later = ran[ran.index(producers[-1]) + 1 :]
                trials = (
                    Neurons(layer, producers, reader)
                    for reader in later
                    if linears[reader].in_features == m
                )
                found += [trial for trial in trials if _permutable(model, trial, calls)][:1]
    return found


def put_in_order(model: nn.Module, neurons: Sequence[Neurons]) -> int:
    """Put neurons in the sequence in which the row IDs among their producers compute them.

    Exact: rows and columns change places, and dense layers that were kept to learn from follow.
    Where row IDs disagree about the order, or the layer no longer answers the same (a norm between
    producers and consumer was trained), all stays as it is.

    Returns:
        How many of ``neurons`` were put in order.

    Cost: as :func:`find_neurons`, and a copy of the consumers' weights.
    """
    if not neurons:
        return 0
    done = 0
    names = dict.fromkeys(n for each in neurons for n in (each.layer, each.consumer))
    with _watching(model, list(names)) as calls:
        for each in neurons:
            sequence = _common_sequence([model.get_submodule(name) for name in each.producers])
            if sequence is None or not _permutable(model, each, calls):
                continue
            for name in each.producers:
                _reorder_outputs(model.get_submodule(name), sequence)
            _reorder_inputs(model.get_submodule(each.consumer), sequence)
            done += 1
    return done


# -- finding -------------------------------------------------------------------------------------


def _linears(parent: nn.Module) -> list[tuple[str, nn.Linear | FactoredLinear]]:
    """Below a decoder layer, dense and factored; not the factors."""
    found = [
        (name, m) for name, m in parent.named_modules() if isinstance(m, nn.Linear | FactoredLinear)
    ]
    containers = tuple(f"{name}." for name, m in found if isinstance(m, FactoredLinear))
    return [(name, m) for name, m in found if not name.startswith(containers)]


@contextmanager
def _watching(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _Call]]:
    """The calls of those modules that one forward pass calls once, in the order in which they end.

    Inside the context the modules can be called again as they were.
    """
    calls: dict[str, list[_Call]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.setdefault(name, []).append(_Call(args, kwargs, output))

        return hook

    with ExitStack() as stack:
        device = stack.enter_context(upstream.evaluation_forward(model, logits=False))
        stack.enter_context(torch.no_grad())
        with ExitStack() as hooks:
            for name in names:
                module = model.get_submodule(name)
                handle = module.register_forward_hook(watch(name), with_kwargs=True)
                hooks.callback(handle.remove)
            upstream.try_out(model, device)
        yield {name: seen[0] for name, seen in calls.items() if len(seen) == 1 and seen[0].args}


def _side_by_side(
    names: Sequence[str],
    linears: Mapping[str, nn.Linear | FactoredLinear],
    calls: Mapping[str, _Call],
) -> list[tuple[str, ...]]:
    """Those of the dense Linears together that read one tensor and have equally many outputs."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in names:
        if isinstance(linears[name], FactoredLinear):
            continue
        key = (id(calls[name].args[0]), linears[name].out_features)
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values()]


def _quantized(module: nn.Module) -> bool:
    return getattr(module, "quantization_scheme", None) is not None


def _permutable(model: nn.Module, neurons: Neurons, calls: Mapping[str, _Call]) -> bool:
    """Whether the consumer and the layer see the same whatever the order of the neurons."""
    if not {neurons.layer, neurons.consumer} <= calls.keys():
        return False
    whole, reading = calls[neurons.layer], calls[neurons.consumer].args[0]
    order = torch.randperm(reading.shape[-1], generator=torch.Generator().manual_seed(0))
    order = order.to(reading.device)
    read: list[torch.Tensor] = []

    def permute(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output[..., order]

    def restore(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        read.append(args[0][..., order.argsort()])
        return (read[-1], *args[1:])

    with ExitStack() as stack:
        for name in neurons.producers:
            handle = model.get_submodule(name).register_forward_hook(permute)
            stack.callback(handle.remove)
        consumer = model.get_submodule(neurons.consumer)
        stack.callback(consumer.register_forward_pre_hook(restore).remove)
        answer = model.get_submodule(neurons.layer)(*whole.args, **whole.kwargs)
    return len(read) == 1 and _alike(read[0], reading) and _alike(answer, whole.output)


def _alike(one: Any, other: Any) -> bool:
    one, other = (x[0] if isinstance(x, tuple) else x for x in (one, other))
    if not (torch.is_tensor(one) and torch.is_tensor(other) and one.shape == other.shape):
        return False
    limit = _ROUNDING * torch.finfo(one.dtype).eps
    return bool((one - other).double().norm() <= limit * other.double().norm())


# -- putting in order ----------------------------------------------------------------------------


def _common_sequence(producers: Sequence[nn.Module]) -> torch.Tensor | None:
    """The outputs in the order in which the row IDs compute them; None where that is no matter of
    one order, or where they are in it already."""
    orders = [p.order.long() for p in producers if isinstance(p, InterpolativeLinear)]
    ready = all(
        isinstance(p, nn.Linear) or (isinstance(p, InterpolativeLinear) and p.dense is None)
        for p in producers
    )
    if not (ready and orders) or any(not torch.equal(order, orders[0]) for order in orders):
        return None
    straight = torch.arange(len(orders[0]), device=orders[0].device)
    return None if torch.equal(orders[0], straight) else orders[0].argsort()


def _reorder_outputs(producer: nn.Module, sequence: torch.Tensor) -> None:
    if isinstance(producer, InterpolativeLinear):
        straight = torch.arange(len(sequence), device=sequence.device)
        update_offload_parameter(producer, "order", straight.to(producer.order.dtype))
        if producer.bias is not None:
            update_offload_parameter(producer, "bias", producer.bias.detach()[sequence])
    for linear in _dense(producer):
        update_offload_parameter(linear, "weight", linear.weight.detach()[sequence])
        if linear.bias is not None:
            update_offload_parameter(linear, "bias", linear.bias.detach()[sequence])


def _reorder_inputs(consumer: nn.Module, sequence: torch.Tensor) -> None:
    linears = _dense(consumer)
    if isinstance(consumer, FactoredLinear) and consumer.dense is None:
        linears.append(next(iter(consumer.factors.values())))
        if isinstance(consumer, CURLinear):
            columns = sequence.argsort()[consumer.columns.long()]
            update_offload_parameter(consumer, "columns", columns.to(consumer.columns.dtype))
    for linear in linears:
        update_offload_parameter(linear, "weight", linear.weight.detach()[:, sequence])


def _dense(module: nn.Module) -> list[nn.Linear]:
    """The dense layers in a module's place: itself, or what answers for it or teaches it."""
    if isinstance(module, nn.Linear):
        return [module]
    assert isinstance(module, FactoredLinear)
    return list({linear for linear in (module.dense, module.teacher) if linear is not None})
