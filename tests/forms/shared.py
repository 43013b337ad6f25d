"""Layers that share a skeleton, for the tests of the forms."""

from __future__ import annotations

import torch
from torch import nn

from cur_modifier.forms.row_id import RowIDLinear, load_shared, shared_skeleton
from cur_modifier.linalg import RowID, interpolative, split_rows

SIZES = [8, 4, 4]
INPUTS, RANK = 6, 5


def parts_of(W: torch.Tensor, sizes: list[int], rank: int) -> list[RowID]:
    return split_rows(interpolative(W, rank), sizes)


def make(
    sizes: list[int],
    n: int,
    rank: int,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[RowIDLinear]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(sum(sizes), n, generator=generator)
    parts = parts_of(W, sizes, rank)
    biases = [torch.randn(m, generator=generator) if bias else None for m in sizes]
    layers = shared_skeleton(
        n,
        sizes,
        rank,
        [part.direct_outputs for part in parts],
        bias=[bias] * len(sizes),
        dtype=dtype,
    )
    load_shared(layers, parts, biases)
    return layers


class Attention(nn.Module):
    """A module that hands one tensor to its projections, as models do."""

    def __init__(self, layers: list[RowIDLinear]) -> None:
        super().__init__()
        self.q, self.k, self.v = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)
