"""Which fields of a config say how many units a layer has: found by trying."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cur_modifier.structure.removal import Kind, Units

__all__ = ["config_fields", "config_with", "shapes_with"]

_MOST_FIELDS = 3


def config_fields(
    model: Any, units: Sequence[Units], counts: Mapping[Kind, int]
) -> dict[str, int] | None:
    """Fields of the text config, with their new values, under which the model's class builds all
    layers with ``counts`` units of each kind; None where no fields do.

    Fields are tried that hold the number of units, or of query heads, now; then those that hold
    nothing, as GPT-2's ``n_inner``. Heads keep their size where the config has a field for it.

    Cost: the model built on the meta device for every trial, a handful.
    """
    found: dict[str, int] = {}
    for kind, count in counts.items():
        own = [each for each in units if each.kind == kind]
        if all(each.count == count for each in own):
            continue
        others = [each for each in units if each.kind != kind]
        unchanged = {each.consumer: each.count for each in others}
        wanted = shapes_with(model, units, {each.consumer: count for each in own} | unchanged)
        for fields in _candidates(model.config.get_text_config(), own[0], count):
            if _built(model, fields) == wanted:
                found |= fields
                break
        else:
            return None
    every = {each.consumer: counts[each.kind] for each in units}
    return found if _built(model, found) == shapes_with(model, units, every) else None


def config_with(config: Any, fields: Mapping[str, int]) -> Any:
    """A copy of a config with other values in the fields of its text config."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    for name, value in fields.items():
        setattr(text, name, value)
    return changed


def shapes_with(
    model: nn.Module, units: Sequence[Units], counts: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name, once each consumer's units are so many."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for each in units:
        gone = each.count - counts[each.consumer]
        sides = [(name, 0, gone * f.shape[1]) for name, f in each.producers.items()]
        sides.append((each.consumer, 1, gone * each.reads.shape[1]))
        for name, side, fewer in sides:
            module = model.get_submodule(name)
            # A Conv1D stores its weight transposed.
            turned = isinstance(module, Conv1D)
            key = f"{name}.weight"
            sizes = list(shapes[key])
            sizes[1 - side if turned else side] -= fewer
            shapes[key] = tuple(sizes)
            if side == 0 and f"{name}.bias" in shapes:
                [size] = shapes[f"{name}.bias"]
                shapes[f"{name}.bias"] = (size - fewer,)
    return shapes


def _candidates(config: Any, units: Units, count: int) -> Iterator[dict[str, int]]:
    held = config.to_dict()
    whole = {n: v for n, v in held.items() if isinstance(v, int) and not isinstance(v, bool)}
    if units.kind == "neurons":
        for name, value in whole.items():
            if value == units.count:
                yield {name: count}
        for name, value in held.items():
            if value is None:
                yield {name: count}
        return
    heads = getattr(config, "num_attention_heads", units.count)
    each = heads // units.count
    values = {units.count: count, heads: each * count}
    names = [name for name, value in whole.items() if value in values]
    # Where a class has no field of that name, it may read one all the same, as Qwen2's does.
    size = {"head_dim": units.reads.shape[1] // each}
    for number in range(1, min(len(names), _MOST_FIELDS) + 1):
        for chosen in combinations(names, number):
            yield {name: values[whole[name]] for name in chosen} | size


def _built(model: Any, fields: Mapping[str, int]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all parameters that the model's class makes of a config with other fields; None
    where it makes none."""
    try:
        with torch.device("meta"):
            made = type(model)(config_with(model.config, fields))
    except Exception:  # each class has its own way to refuse values that do not go together
        return None
    return {name: tuple(p.shape) for name, p in made.named_parameters(remove_duplicate=False)}
