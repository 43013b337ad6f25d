"""Dense Linears of other sizes than a model's config gives them.

This file is also shipped inside checkpoints.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .schema import DenseSize, SchemaError

__all__ = ["Matrix", "is_matrix", "resize", "set_integers", "size_of"]

Matrix = nn.Linear | Conv1D
"""A dense Linear; a ``Conv1D`` of transformers is one that stores its weight transposed."""


def is_matrix(module: nn.Module | None) -> TypeGuard[Matrix]:
    """Whether a module is a dense Linear."""
    return isinstance(module, Matrix)


def size_of(module: Matrix) -> DenseSize:
    """The sizes that a dense Linear has."""
    if isinstance(module, Conv1D):
        return DenseSize(out_features=module.nf, in_features=module.nx, transposed=True)
    return DenseSize(out_features=module.out_features, in_features=module.in_features)


def resize(model: nn.Module, name: str, size: DenseSize) -> None:
    """Give a dense Linear of an empty model other sizes, in place. A bias stays one.

    Raises:
        SchemaError: the model has no dense Linear of that name, or it stores its weight the other
            way round.
    """
    module = _find(model, name, "is resized")
    if not is_matrix(module):
        raise SchemaError(
            f"config.json says that {name} is resized; here it is a {type(module).__name__}, and "
            "only an nn.Linear or a Conv1D can be. The checkpoint belongs to another architecture "
            "or transformers version."
        )
    if size_of(module).transposed != size.transposed:
        raise SchemaError(
            f"config.json says that {name} has transposed={size.transposed}, but here it is a "
            f"{type(module).__name__}. The checkpoint belongs to another architecture or "
            "transformers version."
        )
    if isinstance(module, Conv1D):
        module.nf, module.nx = size.out_features, size.in_features
    else:
        module.out_features, module.in_features = size.out_features, size.in_features
    module.weight = _empty_like(module.weight, size.weight_shape)
    if module.bias is not None:
        module.bias = _empty_like(module.bias, (size.out_features,))


def set_integers(model: nn.Module, name: str, values: dict[str, int]) -> None:
    """Set plain integers of a module, e.g. its number of heads.

    Raises:
        SchemaError: the model has no module of that name, or the module has no such integer.
    """
    module = _find(model, name, f"has {', '.join(values)}")
    for attribute, value in values.items():
        if type(vars(module).get(attribute)) is not int:
            raise SchemaError(
                f"config.json says that {name}.{attribute} is {value}, but a "
                f"{type(module).__name__} has no integer of that name. The checkpoint belongs to "
                "another architecture or transformers version."
            )
        setattr(module, attribute, value)


def _find(model: nn.Module, name: str, said: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SchemaError(
            f"config.json says that {name} {said}, but {type(model).__name__} has no such module. "
            "The checkpoint belongs to another architecture or transformers version."
        ) from None


def _empty_like(tensor: torch.Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad)
