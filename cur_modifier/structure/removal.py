"""Units of a layer that can be removed: neurons of MLPs, heads of attention, channels of
convolutions.

Producers compute the features of every unit, a consumer reads them, nobody else does. Without some
units the layer is a smaller dense layer of the same kind, which answers as the whole one does when
the consumer reads zeros in their place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from cur_modifier.forms.base import is_factored
from cur_modifier.forms.resize import is_matrix
from cur_modifier.linalg import kept_features
from cur_modifier.structure.operators import is_convolution, matrix_of, smaller
from cur_modifier.structure.units import is_quantized

__all__ = ["Kind", "Units", "dense_matrices", "left_of", "remove", "smaller_norm"]

Kind = Literal["neurons", "heads", "channels"]


@dataclass(frozen=True)
class Units:
    """The units of one kind in one layer.

    Attributes:
        layer: its name.
        kind: ``neurons`` have one feature, ``heads`` as many as a key/value head and its queries,
            ``channels`` as many as a kernel has places, or as pixels that a Linear reads.
        producers: by name of a module ``(units, k)``, which of its outputs belong to each unit.
        consumer: the module that reads all of them.
        reads: ``(units, w)``, which of its inputs are each unit's.
        attributes: integers of other modules, by module and name, that count units: so many for
            each one.
        norms: names of the batch norms between, which have a feature for each unit.
    """

    layer: str
    kind: Kind
    producers: Mapping[str, torch.Tensor]
    consumer: str
    reads: torch.Tensor = field(repr=False)
    attributes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    norms: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.reads)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the producers, and of the consumer."""
        return (*self.producers, self.consumer)


def remove(
    model: nn.Module,
    units: Units,
    kept: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Remove all units but those ``kept`` (indices, ascending) from the model.

    Args:
        weight: ``(m, kept · w)`` of the consumer, corrected for what is gone; by default its own
            columns of what is kept.
        bias: ``(m,)`` of the consumer; by default its own.
    """
    for name, features in units.producers.items():
        module = model.get_submodule(name)
        outputs = kept_features(features, kept, len(matrix_of(module)))
        own = _bias(module)
        made = smaller(module, matrix_of(module)[outputs], None if own is None else own[outputs])
        model.set_submodule(name, made)
    consumer = model.get_submodule(units.consumer)
    if weight is None:
        weight = matrix_of(consumer)[
            :, kept_features(units.reads, kept, matrix_of(consumer).shape[1])
        ]
    made = smaller(consumer, weight, _bias(consumer) if bias is None else bias)
    model.set_submodule(units.consumer, made)
    for name in units.norms:
        model.set_submodule(name, smaller_norm(model.get_submodule(name), kept))
    for (name, attribute), each in units.attributes.items():
        setattr(model.get_submodule(name), attribute, each * len(kept))


def left_of(units: Units, kept: torch.Tensor, consumer: nn.Module) -> tuple[int, torch.Tensor]:
    """Which axis of what the consumer reads holds units, and the indices on it of ``kept`` ones and
    of what belongs to none."""
    if is_convolution(consumer):
        places = consumer.weight[0, 0].numel()
        channels = units.reads[:, :1] // places
        return 1, kept_features(channels, kept, consumer.in_channels)
    return -1, kept_features(units.reads, kept, matrix_of(consumer).shape[1])


def smaller_norm(module: nn.Module, kept: torch.Tensor) -> nn.BatchNorm2d:
    """A batch norm of the features ``kept``."""
    assert isinstance(module, nn.BatchNorm2d)
    made = copy.deepcopy(module)
    made.num_features = len(kept)
    for name, parameter in module.named_parameters():
        own = parameter.detach()[kept.to(parameter.device)].clone()
        setattr(made, name, nn.Parameter(own, requires_grad=parameter.requires_grad))
    for name, buffer in module.named_buffers():
        if buffer.ndim:  # the number of batches is one of all features
            setattr(made, name, buffer[kept.to(buffer.device)].clone())
    return made


def dense_matrices(model: nn.Module, layer: str) -> dict[str, nn.Module]:
    """The Linears, ``Conv1D`` and convolutions of a layer by name, but those that are factored,
    quantized or in groups."""
    found: dict[str, nn.Module] = {}
    factored: tuple[str, ...] = ()
    for name, module in model.get_submodule(layer).named_modules(prefix=layer):
        if is_factored(module):
            factored = (*factored, f"{name}.")
        elif name.startswith(factored) or is_quantized(module):
            continue
        elif is_matrix(module):
            found[name] = module
    return found


def _bias(module: nn.Module) -> torch.Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()
