"""Dense Linears and convolutions of other sizes than a model's config gives them, and batch norms.

This file is also shipped inside checkpoints.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .schema import DenseSize, SchemaError

__all__ = ["Matrix", "is_matrix", "resize", "resize_norm", "set_integers", "size_of"]

Matrix = nn.Linear | Conv1D | nn.Conv2d
"""A dense Linear, or a convolution of images that is not in groups. A ``Conv1D`` of transformers is
a Linear that stores its weight transposed."""


def is_matrix(module: nn.Module | None) -> TypeGuard[Matrix]:
    """Whether a module is a dense Linear or a convolution of images."""
    return isinstance(module, Matrix) and getattr(module, "groups", 1) == 1


def size_of(module: Matrix) -> DenseSize:
    """The sizes that a dense Linear or a convolution has."""
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        return DenseSize(
            out_features=module.out_channels,
            in_features=module.in_channels,
            kernel_size=(height, width),
        )
    if isinstance(module, Conv1D):
        return DenseSize(out_features=module.nf, in_features=module.nx, transposed=True)
    return DenseSize(out_features=module.out_features, in_features=module.in_features)


def resize(model: nn.Module, name: str, size: DenseSize) -> None:
    """Give a dense Linear or a convolution of an empty model other sizes, in place. A bias stays
    one.

    Raises:
        SchemaError: the model has none of that name, it stores its weight the other way round, or
            it has another kernel.
    """
    module = _find(model, name, "is resized")
    if not is_matrix(module):
        raise SchemaError(
            f"config.json says that {name} is resized; here it is a {type(module).__name__}, and "
            "only an nn.Linear, a Conv1D or an nn.Conv2d without groups can be. The checkpoint "
            "belongs to another architecture or transformers version."
        )
    if size_of(module).transposed != size.transposed:
        raise SchemaError(
            f"config.json says that {name} has transposed={size.transposed}, but here it is a "
            f"{type(module).__name__}. The checkpoint belongs to another architecture or "
            "transformers version."
        )
    if size_of(module).kernel_size != size.kernel_size:
        raise SchemaError(
            f"config.json says that {name} has kernel_size={size.kernel_size}, but here it is a "
            f"{type(module).__name__} with {size_of(module).kernel_size}. The checkpoint belongs "
            "to another architecture or transformers version."
        )
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = size.out_features, size.in_features
    elif isinstance(module, Conv1D):
        module.nf, module.nx = size.out_features, size.in_features
    else:
        module.out_features, module.in_features = size.out_features, size.in_features
    module.weight = _empty_like(module.weight, size.weight_shape)
    if module.bias is not None:
        module.bias = _empty_like(module.bias, (size.out_features,))


def resize_norm(model: nn.Module, name: str, features: int) -> None:
    """Give a batch norm of an empty model another number of features, in place.

    Raises:
        SchemaError: the model has no batch norm of that name.
    """
    module = _find(model, name, "is resized")
    if not isinstance(module, nn.BatchNorm2d):
        raise SchemaError(
            f"config.json says that {name} is a batch norm of {features} features; here it is a "
            f"{type(module).__name__}. The checkpoint belongs to another architecture or "
            "transformers version."
        )
    module.num_features = features
    for key, parameter in [*module.named_parameters(recurse=False)]:
        setattr(module, key, _empty_like(parameter, (features,)))
    for key, buffer in [*module.named_buffers(recurse=False)]:
        if buffer.ndim:  # the number of batches is one for all features
            setattr(module, key, torch.empty(features, dtype=buffer.dtype, device=buffer.device))


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
