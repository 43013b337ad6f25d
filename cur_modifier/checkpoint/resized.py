"""Sizes of a model that its config does not give, because a stage removed neurons, heads or
channels.

A stage that resizes Linears or convolutions calls :func:`mark_resized`. Saving then compares the
model with the one that the config alone builds. Where both have the same sizes, the checkpoint
needs no entry of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cur_modifier.forms.base import factored_layers
from cur_modifier.forms.resize import is_matrix, size_of
from cur_modifier.forms.schema import DenseSize

__all__ = ["Differences", "differences", "mark_resized", "resized_fields"]

_MARK = "_cur_resized"


@dataclass(frozen=True)
class Differences:
    """How a model differs from the one that its config builds.

    Attributes:
        dense: the dense Linears and convolutions of other sizes, by name.
        factored: names of the factored layers that stand for Linears of other sizes.
        integers: plain integers by the module's name and the attribute's: of the modules that hold
            a Linear of other sizes, those that have another value.
        norms: features of the batch norms that have another number of them, by name.
    """

    dense: Mapping[str, DenseSize] = field(default_factory=dict)
    factored: frozenset[str] = frozenset()
    integers: Mapping[str, dict[str, int]] = field(default_factory=dict)
    norms: Mapping[str, int] = field(default_factory=dict)


def mark_resized(model: nn.Module, fields: Mapping[str, int] | None = None) -> None:
    """Note that a stage resized Linears of ``model``. Harmless when repeated.

    A stage also calls :func:`~cur_modifier.checkpoint.save.wrap_save_pretrained`, before or after.
    ``save_pretrained`` finds what was resized by itself, on two conditions: each module's
    ``in_features`` and ``out_features`` (``nx`` and ``nf`` of a Conv1D, channels of a convolution)
    are those of its weight, and the config has the new sizes where its fields can express them.

    Args:
        fields: of the text config, with their new values. llm-compressor saves the config of the
            checkpoint that the model came from, so what was changed since is put there again.
    """
    setattr(model, _MARK, resized_fields(model) | dict(fields or {}))


def resized_fields(model: nn.Module) -> dict[str, int]:
    """Fields of the text config that stages changed, with their values."""
    return dict(getattr(model, _MARK, None) or {})


def differences(model: nn.Module) -> Differences:
    """Compare a model with the one that its config builds. Nothing unless it is marked.

    Cost: building the model without memory for its weights, a second or two.

    Raises:
        ValueError: a difference that no checkpoint can record; it names the tensor.
    """
    if getattr(model, _MARK, None) is None:
        return Differences()
    built = _built(model)
    expected = dict(built.named_modules())
    layers = factored_layers(model)
    factors = tuple(f"{name}." for name in layers)
    dense: dict[str, DenseSize] = {}
    norms: dict[str, int] = {}
    for name, module in model.named_modules():
        twin = expected.get(name)
        if isinstance(module, nn.BatchNorm2d) and isinstance(twin, nn.BatchNorm2d):
            if module.num_features != twin.num_features:
                norms[name] = module.num_features
            continue
        if name.startswith(factors) or not is_matrix(module) or not is_matrix(twin):
            continue
        if size_of(module) != size_of(twin):
            dense[name] = size_of(module)
    factored = {
        name
        for name, layer in layers.items()
        if isinstance(twin := expected.get(name), nn.Linear)
        and (layer.out_features, layer.in_features) != (twin.out_features, twin.in_features)
    }
    _check_parameters(model, built, dense, norms, factors)
    changed = [*dense, *factored]
    integers = _integers(model, expected, changed)
    return Differences(dense, frozenset(factored), integers, norms)


def _built(model: nn.Module) -> nn.Module:
    """The model that the config builds, on the meta device."""
    config: Any = copy.deepcopy(model.config)  # which a model's constructor may change
    with torch.device("meta"):
        built: nn.Module = type(model)(config)
    return built


def _check_parameters(
    model: nn.Module,
    built: nn.Module,
    dense: Mapping[str, DenseSize],
    norms: Mapping[str, int],
    factors: tuple[str, ...],
) -> None:
    """Refuse what could be saved, but not be loaded again."""
    expected = dict(built.named_parameters())
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if name.startswith(factors):
            continue
        if owner in dense:
            shape = _shape_of(dense[owner], kind)
        elif owner in norms:
            shape = (norms[owner],)
        elif name in expected:
            shape = tuple(expected[name].shape)
        else:
            continue
        if shape is not None and tuple(parameter.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}, but its module and the model's config "
                f"give {shape}. A checkpoint can record other sizes of Linears, convolutions and "
                "batch norms only, and takes them from in_features and out_features, in_channels "
                "and out_channels, and num_features. Set those, or change the config."
            )
    for name in dense:
        found, wanted = (m.get_submodule(name).bias is not None for m in (model, built))
        if found != wanted:
            raise ValueError(
                f"{name} has {'a' if found else 'no'} bias, where the model's config builds "
                f"{'one' if wanted else 'none'}. A checkpoint can't record that: keep biases as "
                "they are."
            )


def _shape_of(size: DenseSize, kind: str) -> tuple[int, ...] | None:
    """Shape of a resized Linear's parameter; None where a quantized format gives it others."""
    return {"weight": size.weight_shape, "bias": (size.out_features,)}.get(kind)


def _integers(
    model: nn.Module, expected: Mapping[str, nn.Module], changed: list[str]
) -> dict[str, dict[str, int]]:
    """The integers, by name, of what holds a changed module that are not as the config has them."""
    found: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(holder for each in changed for holder in _holders(each)):
        theirs = _own_integers(expected[name])
        own = {
            key: value
            for key, value in _own_integers(model.get_submodule(name)).items()
            if key in theirs and value != theirs[key]
        }
        if own:
            found[name] = own
    return found


def _holders(name: str) -> Iterator[str]:
    """Names of the modules that hold one, from its parent up to the model, which is ``""``."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _own_integers(module: nn.Module) -> dict[str, int]:
    """The public attributes that are plain integers."""
    return {
        key: value
        for key, value in vars(module).items()
        if type(value) is int and not key.startswith("_")
    }
