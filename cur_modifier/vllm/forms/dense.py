"""A part that is not factored, next to one that is: a first factor and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from vllm.model_executor.layers.linear import LinearBase

from cur_modifier.vllm.parts import Part, Schemes

from .base import Linears, Served

__all__ = ["SERVED", "Dense"]


class Dense(Served):
    """``y = W x``, split by outputs."""

    def __init__(self, parts: Sequence[Part], schemes: Schemes) -> None:
        [self.part] = parts
        super().__init__(parts, (self.part, ""), self.part.width)

    @property
    def direct(self) -> bool:
        return True

    @property
    def whole(self) -> bool:
        return self.part.tp_size == 1

    def make_first(self, linears: Linears) -> LinearBase:
        return linears.last(self.part, self.part.name, self.part.in_features)

    def output_orders(self, z: int, own: int) -> Iterator[tuple[Part, torch.Tensor]]:
        yield self.part, z + torch.arange(self.rows, device="cpu")

    def tensors(self, part: Part) -> dict[str, tuple[int, ...]]:
        return {"weight": (part.out_features, part.in_features)}

    def weights(
        self, tensors: Mapping[Part, Mapping[str, torch.Tensor]], like: torch.Tensor
    ) -> Iterator[tuple[Part, torch.Tensor]]:
        yield self.part, tensors[self.part]["weight"]


SERVED = Dense
