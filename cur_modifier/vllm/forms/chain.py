"""A chain of factors, each applied to what the one before it gives, as it is served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.utils import replace_parameter

from cur_modifier.vllm.parts import Part, Schemes
from cur_modifier.vllm.slots import Slots

from .base import Linears, Served, is_plain

__all__ = ["Chain"]

# Above this an entry of T lets the skeleton's rounding show in the other outputs.
_LARGEST_ENTRY = 16.0


class Chain(Served):
    """``y = C (U z)`` or ``y = C z``, of ``z = R x``: a first factor ``R (r, n)``, a last factor
    ``C (m, r)``, and square ones ``U (r, r)`` between them.

    Where nothing is quantized it is prepared in its compact form, a row ID with ``S = C[I] U R`` in
    R's place and ``T = C[rest] C[I]⁻¹`` in C's: ``r (m + n − r)`` numbers, and two products. ``I``
    are LU pivots of this rank's rows of C. Where they leave large entries in T, U is multiplied
    into C instead.

    Attributes:
        factors: names of the children, in the order in which they are applied.
    """

    factors: tuple[str, ...]

    def __init__(self, parts: Sequence[Part], schemes: Schemes) -> None:
        [self.part] = parts
        assert self.part.spec is not None
        self.rank = self.part.spec.rank
        super().__init__(parts, (self.part, self.factors[0]), self.rank)
        self._linears: dict[str, LinearBase] = {}
        # Of the outputs among [z, piece]. vLLM makes Linears under the device that it serves on.
        self._order = self.rank + torch.arange(self.part.width, device="cpu")
        self._entries = self.part.width

    @property
    def direct(self) -> bool:
        """Whether it takes its compact form."""
        return self.part.width > self.rank and all(map(is_plain, self._linears.values()))

    def shapes(self) -> list[list[tuple[int, int]]]:
        if self.direct:
            return [[(self.part.width - self.rank, self.rank)]]
        between = [(self.rank, self.rank) for _ in self.factors[1:-1]]
        return [[*between, (self.part.width, self.rank)]]

    def make(self, linears: Linears) -> None:
        for name in self.factors[1:-1]:
            prefix = f"{self.part.name}.{name}"
            self._linears[name] = linears.repeated(prefix, self.rank, self.rank)
        last = self.factors[-1]
        self._linears[last] = linears.last(self.part, f"{self.part.name}.{last}", self.rank)
        self.chains = [list(self._linears.values())]

    def declare(self, slots: Slots) -> None:
        for name, linear in self._linears.items():
            slots.declare(self.part, name, linear)

    def prepare(self, first: torch.Tensor | None) -> None:
        if not self.direct or first is None:
            return
        *between, linear = self._linears.values()
        inner = [one.weight.float() for one in between]
        self._linears = {self.factors[-1]: linear}
        C = linear.weight.float()
        rows, second = _interpolation(C)
        if bool((second.abs() <= _LARGEST_ENTRY).all()):
            skeleton = reduce(lambda z, U: U @ z, inner, first.float())
            first.copy_(C[rows[: self.rank].to(C.device)] @ skeleton)
            self._order = rows.argsort()
        elif inner:
            second = reduce(torch.matmul, reversed(inner), C)
        else:
            second = C
        self.chains, self._entries = [[linear]], len(second)
        replace_parameter(linear, "weight", second.to(linear.weight.dtype))

    @property
    def entries(self) -> int:
        return self._entries

    def output_orders(self, z: int, own: int) -> Iterator[tuple[Part, torch.Tensor]]:
        order = self._order
        yield self.part, torch.where(order < self.rank, z + order, own - self.rank + order)

    def weights(
        self, tensors: Mapping[Part, Mapping[str, torch.Tensor]], like: torch.Tensor
    ) -> Iterator[tuple[Part, torch.Tensor]]:
        own = tensors[self.part]
        weights = [own[f"{name}.weight"].float() for name in self.factors]
        yield self.part, reduce(lambda product, factor: factor @ product, weights)


def _interpolation(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows ``(m,)`` of ``C (m, r)``, LU pivots first, and ``T = C[rest] C[I]⁻¹``."""
    rank = C.shape[1]
    lu, pivots, _ = torch.linalg.lu_factor_ex(C)
    rows = list(range(len(C)))
    for step, pivot in enumerate(pivots.tolist()):  # LAPACK records row swaps, one-based
        rows[step], rows[pivot - 1] = rows[pivot - 1], rows[step]
    lower = lu.tril(-1)
    second = torch.linalg.solve_triangular(
        lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
    )
    return torch.tensor(rows, device="cpu"), second
