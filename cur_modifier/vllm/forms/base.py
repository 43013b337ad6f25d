"""What a form's module defines: products, their shapes, and the dense weight that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from cur_modifier.vllm.parts import Part
from cur_modifier.vllm.slots import Slots

__all__ = ["Linears", "Served", "is_plain"]


class Linears(Protocol):
    """Makes Linears below one of vLLM's; ``name`` is a Linear's name in the checkpoint.

    Each method raises ValueError where vLLM has no kernel for a Linear of that size.
    """

    def repeated(self, name: str, inputs: int, outputs: int) -> LinearBase:
        """A Linear that every rank has whole."""

    def stacked(self, name: str, inputs: int, outputs: Sequence[int]) -> LinearBase:
        """Several, as one that every rank has whole."""

    def first(self, name: str, inputs: int, outputs: int) -> LinearBase:
        """A first factor: split by inputs where the layer is row-parallel, else repeated."""

    def last(self, part: Part, name: str, inputs: int) -> LinearBase:
        """A last factor: it computes the part's outputs on this rank."""


class Served:
    """What one part, or several that share a skeleton, are served as.

    A first factor maps ``x`` to ``z``; the first factors of several parts are stacked into one
    product. Chains of Linears map ``z`` to pieces of the parts' outputs.

    A subclass knows its shapes from the start, which is all that :mod:`~cur_modifier.vllm.cost`
    needs. It then serves the factors (:meth:`make`, :meth:`declare`, :meth:`prepare`,
    :meth:`output_orders`), or their product (:meth:`tensors`, :meth:`check`, :meth:`weights`).

    Args:
        parts: in the order of their outputs.
        first: the part and the child that hold the first factor's tensors; the child of a dense
            part is ``""``.
        rows: of the first factor on this rank, and so numbers in ``z``.

    Attributes:
        chains: for each piece, the Linears that make it of ``z``, one after another. Empty until
            :meth:`make`.
    """

    def __init__(self, parts: Sequence[Part], first: tuple[Part, str], rows: int) -> None:
        self.parts = list(parts)
        self.first = first
        self.rows = rows
        self.chains: list[list[LinearBase]] = []

    @property
    def first_name(self) -> str:
        """The first factor's name in the checkpoint."""
        part, child = self.first
        return f"{part.name}.{child}" if child else part.name

    @property
    def direct(self) -> bool:
        """Whether ``z`` are outputs, or at least are laid out among them."""
        return False

    @property
    def whole(self) -> bool:
        """Whether every rank computes all of ``z``, so that the first factor can be stacked with
        others."""
        return True

    def shapes(self) -> list[list[tuple[int, int]]]:
        """``(outputs, inputs)`` of the products in :attr:`chains`, as they are once loaded where
        nothing is quantized."""
        return []

    # Served as factors.

    def make(self, linears: Linears) -> None:
        """Make the Linears after the first factor.

        Raises:
            ValueError: a factor that vLLM has no kernel for at this size.
        """

    def make_first(self, linears: Linears) -> LinearBase:
        """Make the first factor, where it is not stacked with others.

        Raises:
            ValueError: vLLM has no kernel for it at this size.
        """
        return linears.first(self.first_name, self.first[0].in_features, self.rows)

    def declare(self, slots: Slots) -> None:
        """Add a slot for every tensor of the parts except the first factor's and the biases."""

    def prepare(self, first: torch.Tensor | None) -> None:
        """Change the factors, once all are loaded, to what is faster.

        Args:
            first: the first factor's weight ``(rows, inputs)``, to be changed in place; None where
                it is quantized.
        """

    @property
    def entries(self) -> int:
        """Numbers that the pieces hold, for each token."""
        return 0

    def output_orders(self, z: int, own: int) -> Iterator[tuple[Part, torch.Tensor]]:
        """For each part, which entry of everything each of its outputs on this rank is.

        Args:
            z, own: the entries at which ``z`` and the pieces begin.
        """
        raise NotImplementedError

    # Served as their product.

    def tensors(self, part: Part) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that the part's weight is made of, by its name below the part."""
        assert part.spec is not None
        return part.spec.sizes.tensors(part.spec, bias=False)

    def check(self, part: Part, key: str, tensor: torch.Tensor) -> None:
        """Check a tensor whose shape fits.

        Raises:
            SchemaError: its values make no sense.
        """

    def weights(
        self, tensors: Mapping[Part, Mapping[str, torch.Tensor]], like: torch.Tensor
    ) -> Iterator[tuple[Part, torch.Tensor]]:
        """The dense weight ``(m, n)`` of each part, over all ranks, each number rounded once.

        Args:
            tensors: of all parts, named as :meth:`tensors` names them.
            like: a tensor of the device and the dtype that are served.
        """
        raise NotImplementedError


def is_plain(linear: LinearBase) -> bool:
    """Whether nothing is quantized, so that its weight can be read."""
    return isinstance(linear.quant_method, UnquantizedLinearMethod)
