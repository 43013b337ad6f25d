"""Which units of a layer can be removed, found by trying on a copy of it.

No name of a module or of an attribute is known in advance: layouts that fit the sizes are tried,
until the layer without some units answers as the whole one does with zeros in their place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

import torch
from torch import nn

from cur_modifier.structure.channels import channel_layouts, norms_below
from cur_modifier.structure.heads import head_layouts
from cur_modifier.structure.layers import below
from cur_modifier.structure.operators import as_matrix, is_convolution, matrix_of
from cur_modifier.structure.readers import Call, called_once, first_tensor, recorded
from cur_modifier.structure.removal import Kind, Units, dense_matrices, left_of, remove

__all__ = ["find_units"]

# Relative difference of two float32 computations of one thing; another thing differs by more.
_ROUNDING = 1e-4
# Subsets of attributes that are tried before a layout is given up.
_TRIES = 64


def find_units(
    model: nn.Module, layers: Sequence[str], kinds: Sequence[Kind], run: Callable[[], None]
) -> list[Units]:
    """The units of the layers, layer by layer, as far as they can be removed.

    Modules that are factored or quantized are not looked at, nor those that run several times in a
    pass, as experts of a mixture.

    Args:
        layers: names of the layers to look at.
        run: a forward pass of a few tokens, in whose context modules can be called again as they
            were.

    Cost: that pass; for each layout that fits a float32 copy of one layer, and two passes through
    it, for one that is right four.
    """
    matrices = {name: m for layer in layers for name, m in dense_matrices(model, layer).items()}
    norms = norms_below(model, layers) if "channels" in kinds else {}
    with recorded(model, [*matrices, *norms, *layers]) as every_call:
        run()
    calls = called_once(every_call) | {n: c[0] for n, c in every_call.items() if n in layers}
    found: list[Units] = []
    for layer in layers:
        inside = [n for n in calls if n.startswith(below(layer))]
        ran = {n: matrices[n] for n in inside if n in matrices}
        linears = {n: m for n, m in ran.items() if not is_convolution(m)}
        trial = _Trial(model, layer, calls)
        for kind in kinds:
            if kind == "channels":
                own = {n: norms[n] for n in inside if n in norms}
                found += _first_proven(trial, channel_layouts(layer, inside, ran, own, calls))
                continue
            layouts = _neurons if kind == "neurons" else _heads
            proven = map(trial.proven, layouts(model, layer, linears, calls))
            found += [units for units in proven if units is not None]
    return found


def _first_proven(trial: _Trial, layouts: Iterable[Units]) -> list[Units]:
    """Of the layouts that have a producer or the consumer in common, the first that is proven."""
    found: list[Units] = []
    producers: set[str] = set()
    consumers: set[str] = set()
    for units in layouts:
        if units.consumer in consumers or not producers.isdisjoint(units.producers):
            continue
        if (proven := trial.proven(units)) is not None:
            found.append(proven)
            producers.update(proven.producers)
            consumers.add(proven.consumer)
    return found


class _Trial:
    """Removes units from a copy of a layer, and compares."""

    def __init__(self, model: nn.Module, layer: str, calls: Mapping[str, Call]) -> None:
        self._model = model
        self._layer = layer
        self._calls = calls

    def proven(self, units: Units) -> Units | None:
        """The units with the attributes that count them, or None where they can't be removed."""
        if self._layer not in self._calls or units.count < 2:
            return None
        generator = torch.Generator().manual_seed(0)
        kept = torch.randperm(units.count, generator=generator)[: units.count // 2].sort().values
        # Every other one: where units are halved by mistake, no two halves stay together.
        other = torch.arange(0, units.count, 2)
        wanted = self._answer(units, kept, None)
        for attributes in islice(_counting(self._model, units), _TRIES):
            trial = replace(units, attributes=attributes)
            if self._answers(trial, kept, wanted) and self._answers(
                trial, other, self._answer(units, other, None)
            ):
                return trial
        return None

    def _answers(
        self, units: Units, kept: torch.Tensor, wanted: tuple[torch.Tensor, ...] | None
    ) -> bool:
        """Whether the layer without the other units answers as wanted."""
        answer = self._answer(units, kept, units)
        assert wanted is not None
        return answer is not None and all(map(_alike, answer, wanted))

    def _answer(
        self, units: Units, kept: torch.Tensor, removed: Units | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the consumer reads of the units ``kept``, and what the layer answers: without the
        others, or by default with zeros in their place. None where it can't be run."""
        holder = nn.Module()
        # A copy by its own name: names of units are those of the whole model.
        layer = copy.deepcopy(self._model.get_submodule(units.layer)).float()
        if units.layer:
            _plant(holder, units.layer, layer)
        else:
            holder = layer
        axis, left = left_of(units, kept, holder.get_submodule(units.consumer))
        if removed is not None:
            remove(holder, removed, kept)
        read: list[torch.Tensor] = []

        def look(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            x = args[0]
            if removed is not None:
                read.append(x)
                return None
            read.append(x.index_select(axis, left.to(x.device)))
            zeros = torch.zeros_like(x)
            return (zeros.index_copy(axis, left.to(x.device), read[-1]), *args[1:])

        call = self._calls[units.layer]
        with ExitStack() as stack:
            handle = holder.get_submodule(units.consumer).register_forward_pre_hook(look)
            stack.callback(handle.remove)
            try:
                out = layer(*_float(call.args), **_float(call.kwargs))
            except (RuntimeError, ValueError, IndexError):  # sizes that do not go together
                return None
        out = first_tensor(out)
        return (read[0], out) if len(read) == 1 and torch.is_tensor(out) else None


def _neurons(
    model: nn.Module, layer: str, ran: Mapping[str, nn.Module], calls: Mapping[str, Call]
) -> Iterator[Units]:
    """Modules that read one tensor and have equally many outputs, with a later one that reads as
    many; or one that has two outputs for each."""
    names = list(ran)
    groups: dict[tuple[int, int], list[str]] = {}
    for name in names:
        groups.setdefault((calls[name].tensor, len(matrix_of(ran[name]))), []).append(name)
    for (_, outputs), producers in groups.items():
        for consumer in names[names.index(producers[-1]) + 1 :]:
            width = matrix_of(ran[consumer]).shape[1]
            every = torch.arange(width)[:, None]
            if outputs == width:
                yield Units(layer, "neurons", dict.fromkeys(producers, every), consumer, every)
                if len(producers) > 2:  # projections of attention that are as wide read it, too
                    for size in (2, 1):
                        for some in combinations(producers, size):
                            own = dict.fromkeys(some, every)
                            yield Units(layer, "neurons", own, consumer, every)
            elif outputs == 2 * width and len(producers) == 1:  # gate and up in one module
                halves = torch.cat([every, width + every], dim=1)
                for features in (halves, torch.arange(outputs).view(width, 2)):
                    yield Units(layer, "neurons", {producers[0]: features}, consumer, every)


def _heads(
    model: Any, layer: str, ran: Mapping[str, nn.Module], calls: Mapping[str, Call]
) -> Iterator[Units]:
    names = list(ran)
    together: dict[int, list[str]] = {}
    for name in names:
        together.setdefault(calls[name].tensor, []).append(name)
    for readers in together.values():
        for size in (3, 1):
            for producers in combinations(readers, size):
                for consumer in names[names.index(producers[-1]) + 1 :]:
                    outputs = [len(matrix_of(ran[name])) for name in producers]
                    inputs = matrix_of(ran[consumer]).shape[1]
                    for layout in head_layouts(model.config, outputs, inputs):
                        features = dict(zip(producers, layout.outputs, strict=True))
                        yield Units(layer, "heads", features, consumer, layout.inputs)


def _counting(model: nn.Module, units: Units) -> Iterator[dict[tuple[str, str], int]]:
    """Sets of attributes that may count units, the smallest first.

    They are integers of the modules around producers and consumer that are as large as the number
    of units, of query heads, or of features. Channels are counted by none.
    """
    if units.kind == "channels":
        yield {}
        return
    around = _common_parent(units.modules)
    sizes = {units.count, units.reads.numel()}
    sizes |= {features.numel() for features in units.producers.values()}
    found: dict[tuple[str, str], int] = {}
    for name, module in model.get_submodule(around).named_modules(prefix=around):
        if as_matrix(module) is not None:
            continue
        for attribute, value in vars(module).items():
            counted = isinstance(value, int) and not isinstance(value, bool)
            if counted and value and (value in sizes or _multiple(value, units)):
                found[name, attribute] = value // units.count
    for size in range(len(found) + 1):
        for chosen in combinations(found.items(), size):
            yield dict(chosen)


def _multiple(value: int, units: Units) -> bool:
    """Whether a number may be that of the query heads: a multiple of the key/value heads."""
    width = units.reads.shape[1]
    each = value // units.count
    return units.kind == "heads" and value == each * units.count and each > 1 and width % each == 0


def _common_parent(names: Sequence[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _plant(holder: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        holder.add_module(part, child := nn.Module())
        holder = child
    holder.add_module(last, module)


def _float(value: Any) -> Any:
    """Tensors of floating point in float32, also in tuples and dictionaries."""
    if torch.is_tensor(value) and value.is_floating_point():
        return value.float()
    if isinstance(value, tuple):
        return tuple(map(_float, value))
    if isinstance(value, dict):
        return {key: _float(each) for key, each in value.items()}
    return value


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).double().norm() <= _ROUNDING * other.double().norm())
