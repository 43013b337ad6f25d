"""CUR as it is served: as a row ID where nothing is quantized, else as its three factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.utils import replace_parameter

from cur_modifier.vllm.parts import Part, Schemes
from cur_modifier.vllm.slots import Slots

from .base import Linears, Served, is_plain

__all__ = ["CUR", "SERVED"]

# Above this an entry of T lets the skeleton's rounding show in the other outputs.
_LARGEST_ENTRY = 16.0


class CUR(Served):
    """``y = C (U z)``, of ``z = R x``.

    Where nothing is quantized it is prepared in its compact form, a row ID with ``S = C[I] U R`` in
    R's place and ``T = C[rest] C[I]⁻¹`` in C's: ``r (m + n − r)`` numbers for ``r (m + n + r)``,
    and two products for three. ``I`` are LU pivots of this rank's rows of C. Where they leave large
    entries in T, U is multiplied into C instead.
    """

    def __init__(self, parts: Sequence[Part], schemes: Schemes) -> None:
        [self.part] = parts
        assert self.part.spec is not None
        self.rank = self.part.spec.rank
        super().__init__(parts, (self.part, "cur_r"), self.rank)
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
        return [[(self.rank, self.rank), (self.part.width, self.rank)]]

    def make(self, linears: Linears) -> None:
        u, c = f"{self.part.name}.cur_u", f"{self.part.name}.cur_c"
        self._linears = {
            "cur_u": linears.repeated(u, self.rank, self.rank),
            "cur_c": linears.last(self.part, c, self.rank),
        }
        self.chains = [list(self._linears.values())]

    def declare(self, slots: Slots) -> None:
        for name, linear in self._linears.items():
            slots.declare(self.part, name, linear)
        for name in ("rows", "columns"):  # say where the factors come from; serving needs neither
            slots.add(self.part, name, lambda tensor: None)

    def prepare(self, first: torch.Tensor | None) -> None:
        if not self.direct or first is None:
            return
        linear = self._linears["cur_c"]
        C, U = linear.weight.float(), self._linears.pop("cur_u").weight.float()
        lu, pivots, _ = torch.linalg.lu_factor_ex(C)
        rows = list(range(len(C)))
        for step, pivot in enumerate(pivots.tolist()):  # LAPACK records row swaps, one-based
            rows[step], rows[pivot - 1] = rows[pivot - 1], rows[step]
        lower = lu.tril(-1)
        second = torch.linalg.solve_triangular(
            lower[: self.rank], lower[self.rank :], upper=False, left=False, unitriangular=True
        )
        if bool((second.abs() <= _LARGEST_ENTRY).all()):
            chosen = torch.tensor(rows[: self.rank], device=C.device)
            first.copy_(C[chosen] @ (U @ first.float()))
            self._order = torch.tensor(rows).argsort()
        else:
            second = C @ U
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
        c, u, r = (tensors[self.part][f"cur_{name}.weight"].float() for name in "cur")
        yield self.part, c @ (u @ r)


SERVED = CUR
