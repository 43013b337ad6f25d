"""The products that a factored vLLM Linear is served as, and the Linears that compute them.

Parts read ``x`` through their first factors (S, R, or a dense part's whole weight). First factors
that are quantized alike are stacked into one product. The products after it are each part's own,
except that small ones are joined into a block-diagonal matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.utils import replace_parameter

from cur_modifier.vllm.cost import Chain, blocks
from cur_modifier.vllm.forms import Served, is_plain
from cur_modifier.vllm.parts import Part, Schemes
from cur_modifier.vllm.slots import Slots

__all__ = ["StackedProduct", "make_products", "stacks"]


class StackedProduct(nn.Module):
    """Parts whose first factors are stacked into one product, and the products after it.

    Args:
        first: the Linear of the first factors.
        served: what it computes, in its order; first those whose ``z`` are outputs.
    """

    def __init__(self, first: LinearBase, served: Sequence[Served]) -> None:
        super().__init__()
        self.first = first
        self.served = list(served)
        self._ends = list(accumulate(each.rows for each in served))
        self.direct = sum(each.rows for each in served if each.direct)
        self._take_up_chains()

    def declare(self, slots: Slots) -> None:
        """Add a slot for every tensor of the parts."""
        for index, each in enumerate(self.served):
            part, child = each.first
            load = partial(_load_shard, index, each.rows) if len(self.served) > 1 else None
            slots.declare(part, child, self.first, load)
            each.declare(slots)

    def prepare(self) -> None:
        """Change the factors, once all are loaded, to what is faster."""
        for each, end in zip(self.served, self._ends, strict=True):
            own = slice(end - each.rows, end)
            each.prepare(self.first.weight.data[own] if is_plain(self.first) else None)
        self._take_up_chains(join=True)

    @property
    def entries(self) -> int:
        """Numbers that the pieces hold, for each token."""
        return self.direct + sum(each.entries for each in self.served)

    def output_orders(self, start: int) -> Iterator[tuple[Part, torch.Tensor]]:
        """For each part, which entry of everything each of its outputs on this rank is.

        Args:
            start: the entry at which this product's begin.
        """
        own = start + self.direct
        for each, end in zip(self.served, self._ends, strict=True):
            yield from each.output_orders(start + end - each.rows, own)
            own += each.entries

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        z = self.first(x)
        pieces = [z[..., : self.direct]] if self.direct else []
        for chain, reads in zip(self._chains, self._reads, strict=True):
            piece = z[..., reads]
            for linear in chain:  # a plain product reads part of a wider tensor where it lies
                piece = linear(piece if is_plain(linear) else piece.contiguous())
            pieces.append(piece)
        return pieces

    def _take_up_chains(self, *, join: bool = False) -> None:
        """Take up the products after the first, by piece; ``join`` makes block matrices of some."""
        linears, chains = [], []
        for each, end in zip(self.served, self._ends, strict=True):
            for chain in each.chains:
                plain = join and all(map(is_plain, chain))
                shapes = [tuple(linear.weight.shape) for linear in chain] if plain else []
                linears.append(chain)
                chains.append(Chain(end - each.rows, end, tuple(shapes)))
        plan = blocks(chains, self.first.params_dtype.itemsize)
        for block in plan:
            joined = linears[block]
            if len(joined) > 1:
                weights = [chain[0].weight for chain in joined]
                replace_parameter(joined[0][0], "weight", torch.block_diag(*weights))
        self._reads = [slice(chains[b.start].start, chains[b.stop - 1].stop) for b in plan]
        self._chains = [linears[block.start] for block in plan]
        self.second = nn.ModuleList(nn.ModuleList(chain) for chain in self._chains)


def _load_shard(index: int, rows: int, param: Any, tensor: torch.Tensor) -> None:
    output_dim = getattr(param, "output_dim", None)
    if output_dim is not None:
        if getattr(param, "packed_dim", None) == output_dim:
            rows //= param.packed_factor
        if tensor.shape[output_dim] != rows:  # vLLM's own loader would take a part of it
            raise ValueError(f"expected {rows} rows")
    param.weight_loader(param, tensor, index)


def stacks(served: Sequence[Served], schemes: Schemes) -> list[list[Served]]:
    """Group what is served by the product that the first factors are stacked in; in each group,
    first those whose ``z`` are outputs."""
    if isinstance(schemes.layer, RowParallelLinear):
        return [[each] for each in served]
    ordered = sorted(served, key=lambda each: not each.direct)
    alone = [[each] for each in ordered if not each.whole]
    groups = schemes.alike([each for each in ordered if each.whole], lambda each: each.first_name)
    return alone + [stack for group in groups for stack in _with_kernel(group, schemes)]


def _with_kernel(group: list[Served], schemes: Schemes) -> list[list[Served]]:
    """The group as it is where its parameters can be stacked, else one by one."""
    scheme = schemes.of(group[0].first_name)
    weights = scheme and scheme.get("weights")
    if weights is not None:
        # An order of the inputs is each weight's own. Zero points are packed by the outputs.
        own_order = str(getattr(weights, "actorder", None) or "").endswith("group")
        packed = not weights.symmetric and any(each.rows % 8 for each in group)
        if own_order or packed:
            return [[each] for each in group]
    return [group]


def make_products(
    served: Sequence[Served], schemes: Schemes, dtype: torch.dtype
) -> list[StackedProduct]:
    """Make the products of all parts of a Linear.

    Raises:
        ValueError: a factor that vLLM has no kernel for at this size.
    """
    linears = _Linears(schemes, dtype)
    for each in served:
        each.make(linears)
    return [linears.product(stack) for stack in stacks(served, schemes)]


@dataclass(frozen=True)
class _Linears:
    """Makes the Linears below one Linear of vLLM's: :class:`~.forms.Linears`.

    vLLM's own schemes give them their parameters, load them, split them over ranks and choose their
    kernels, each by its name in the checkpoint.
    """

    schemes: Schemes
    dtype: torch.dtype

    def product(self, stack: Sequence[Served]) -> StackedProduct:
        """The product of one group of :func:`stacks`."""
        if len(stack) == 1:
            return StackedProduct(stack[0].make_first(self), stack)
        inputs, rows = stack[0].first[0].in_features, [each.rows for each in stack]
        return StackedProduct(self.stacked(stack[0].first_name, inputs, rows), stack)

    def repeated(self, name: str, inputs: int, outputs: int) -> LinearBase:
        return self._make(ReplicatedLinear, name, inputs, outputs)

    def stacked(self, name: str, inputs: int, outputs: Sequence[int]) -> LinearBase:
        return self._make(MergedColumnParallelLinear, name, inputs, list(outputs), disable_tp=True)

    def first(self, name: str, inputs: int, outputs: int) -> LinearBase:
        layer = self.schemes.layer
        if isinstance(layer, RowParallelLinear):
            return self._make(
                RowParallelLinear,
                name,
                inputs,
                outputs,
                reduce_results=False,
                disable_tp=layer.disable_tp,
            )
        return self.repeated(name, inputs, outputs)

    def last(self, part: Part, name: str, inputs: int) -> LinearBase:
        layer, whole = self.schemes.layer, part.shard_id is None
        if whole and isinstance(layer, QKVParallelLinear):
            return self._make(
                QKVParallelLinear,
                name,
                inputs,
                layer.head_size,
                layer.total_num_heads,
                layer.total_num_kv_heads,
                v_head_size=layer.v_head_size,
                disable_tp=layer.disable_tp,
            )
        if whole and isinstance(layer, MergedColumnParallelLinear):
            return self._make(
                MergedColumnParallelLinear,
                name,
                inputs,
                list(layer.output_sizes),
                disable_tp=layer.disable_tp,
            )
        if isinstance(layer, ColumnParallelLinear):
            return self._make(
                ColumnParallelLinear,
                name,
                inputs,
                part.out_features,
                tp_rank=part.tp_rank,
                tp_size=part.tp_size,
            )
        return self.repeated(name, inputs, part.out_features)

    def _make(self, kind: type[LinearBase], prefix: str, *sizes: Any, **kwargs: Any) -> LinearBase:
        try:
            return kind(
                *sizes,
                bias=False,
                params_dtype=self.dtype,
                quant_config=self.schemes.inner,
                prefix=prefix,
                return_bias=False,
                **kwargs,
            )
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise ValueError(
                f"{prefix} ({sizes} on {self.schemes.layer.tp_size} ranks) has no kernel in this "
                f"vLLM: {error} Serve it with a smaller --tensor-parallel-size, or compress it "
                "again with a group_size and multiple_of that divide these sizes."
            ) from error
