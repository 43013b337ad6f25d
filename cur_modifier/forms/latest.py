"""A product that several layers share, kept for those that have not had it yet."""

from __future__ import annotations

import weakref

import torch
from torch import nn

__all__ = ["LatestProduct", "state_of"]


class LatestProduct:
    """``z`` of the latest input, for the layers of a shared skeleton that have not had it yet.

    Each layer gets it once; it is gone when all have, when the input is, or when another comes. So
    a layer that is never called keeps nothing alive, and a second pass over the same input starts
    anew. Copies and pickles of a model hold none.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._x: weakref.ref[torch.Tensor] | None = None
        self._z: torch.Tensor | None = None
        self._state: object = None
        self._waiting: set[int] = set()

    def keep(self, x: torch.Tensor, state: object, z: torch.Tensor, waiting: set[int]) -> None:
        self.forget()
        if state is not None:
            self._x = weakref.ref(x, lambda _: self.forget())
            self._z, self._state, self._waiting = z, state, waiting

    def take(self, x: torch.Tensor, state: object, place: int) -> torch.Tensor | None:
        if self._x is None or self._x() is not x or self._state != state:
            return None
        if place not in self._waiting:
            return None
        z = self._z
        self._waiting.discard(place)
        if not self._waiting:
            self.forget()
        return z

    def __reduce__(self) -> tuple[type[LatestProduct], tuple[()]]:
        return LatestProduct, ()


def state_of(linear: nn.Linear, x: torch.Tensor) -> object:
    """Changes whenever ``linear(x)`` may; None where that can't be told, so nothing may be kept.

    Autograd's graphs are never kept: a backward pass through one layer would free what another
    needs. Compilers see for themselves that two layers compute the same. What is written in place
    through ``.data`` goes unseen, as it does in autograd.
    """
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return None
    tensors = [x]
    for module in linear.modules():
        for held in (module._parameters, module._buffers):
            # compressed-tensors moves an offloaded tensor when it is looked up by its name.
            stored = held if type(held) is dict else getattr(held, "offloaded_values", None)
            if stored is None:
                return None
            tensors += [t for t in stored.values() if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if any(t.is_meta for t in tensors) and not x.is_meta:  # they are elsewhere, on a disk
        return None
    try:
        marks = [(id(t), t._version, t.data_ptr(), t.dtype) for t in tensors]
    except RuntimeError:  # inference mode counts no changes; under vmap there is no storage
        return None
    kind = x.device.type
    lowered = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    precision = torch.get_autocast_dtype(kind) if lowered else None
    return precision, marks
