"""How vLLM runs a Linear that has factored parts: q, k, v each dense, CUR or ID, and so on.

Below the Linear that vLLM's model class makes stand ordinary vLLM Linears, one for each factor and
one for each dense part. vLLM's own schemes give them their parameters, load them, split them over
ranks and choose their kernels, each by its name in the checkpoint.

The first stages of all parts (S, R, dense weights) are stacked into one product, and parts that
share a skeleton have their T stacked. What comes out is put in order for the whole layer at once:
see :mod:`~cur_modifier.vllm.order`. Where the factors of a small layer save fewer bytes than their
additional products cost, they are multiplied out as they are loaded, and the layer is served as a
dense one: see :mod:`~cur_modifier.vllm.dense`.

Tensor parallelism. A column-parallel Linear splits the last factor (C or T) by outputs and repeats
the first (R or S), since every rank needs all of ``z``. A row-parallel Linear splits the first
factor by inputs; the others act on partial sums, and the reduction that vLLM does anyway adds up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)

from cur_modifier.forms.schema import ModuleSpec, SchemaError
from cur_modifier.vllm.dense import DenseWeight, are_plain, save_too_little
from cur_modifier.vllm.order import in_order, pairs_of, runs_of, side_by_side
from cur_modifier.vllm.parts import Part, make_stages
from cur_modifier.vllm.slots import Slots

if TYPE_CHECKING:
    from cur_modifier.vllm.config import CURQuantizationConfig

__all__ = ["FactoredLinearMethod"]


class FactoredLinearMethod(LinearMethodBase):
    """The linear method of one vLLM Linear with at least one factored part.

    Args:
        layouts: the parts by checkpoint name, in the order of their outputs; None for a dense one.
        config: of the checkpoint; its ``inner`` says how factors and dense parts are quantized.
        keep_factors: do not multiply them out, even where that is faster.
    """

    def __init__(
        self,
        layouts: Mapping[str, ModuleSpec | None],
        config: CURQuantizationConfig,
        *,
        keep_factors: bool = False,
    ) -> None:
        self.layouts = layouts
        self.config = config
        self.keep_factors = keep_factors
        self.dense: DenseWeight | None = None  # of a layer that is multiplied out

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make a Linear for every factor and every dense part, and the slots that load them.

        Raises:
            SchemaError: a shape that disagrees with the model's, or a Linear that vLLM splits in a
                way this plugin does not know.
            ValueError: a factor that vLLM has no kernel for at this size.
        """
        parts = split(layer, self.layouts, input_size)
        widths = [part.width for part in parts]
        if sum(widths) != sum(output_partition_sizes):
            raise SchemaError(
                f"{parts[0].name}: vLLM gives this rank {sum(output_partition_sizes)} outputs of a "
                f"{type(layer).__name__}, and this plugin expected {sum(widths)}. It does not know "
                "how that layer is split. Upgrade it: pip install -U cur-modifier"
            )
        inner = self.config.inner
        self.slots = Slots(layer)
        if (
            not self.keep_factors
            and are_plain(parts, layer, inner)
            and save_too_little(parts, input_size_per_partition, params_dtype.itemsize)
        ):
            self.dense = DenseWeight(
                layer,
                parts,
                self.slots,
                input_size_per_partition=input_size_per_partition,
                output_partition_sizes=output_partition_sizes,
                input_size=input_size,
                output_size=output_size,
                params_dtype=params_dtype,
                **extra_weight_attrs,
            )
            return
        layer.stages = nn.ModuleList(make_stages(layer, parts, inner, params_dtype))
        layer.register_buffer("output_order", None, persistent=False)
        layer.register_buffer("output_pairs", None, persistent=False)
        self.dtype = params_dtype
        for stage in layer.stages:
            stage.declare(self.slots)
        self.parts = parts

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the slots away, make CUR compact, and note the order of the outputs.

        vLLM calls this before it prepares the kernels of the Linears below.

        Raises:
            SchemaError: a tensor that never came, or a factored module that no Linear stands for.
        """
        self.config.check_claimed()
        self.slots.close()
        if self.dense is not None:
            self.dense.finish(layer)
            return
        for stage in layer.stages:
            stage.prepare()
        order = self._order(layer)
        self.runs = runs_of(order)
        if self.runs is None:
            device = next(layer.parameters()).device
            entries = sum(stage.entries for stage in layer.stages)
            pairs = pairs_of(order, entries, self.dtype)
            layer.output_order = order.to(device)
            layer.output_pairs = None if pairs is None else pairs.to(device)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.dense is not None:
            return self.dense.method.apply(layer, x, bias)
        pieces = [piece for stage in layer.stages for piece in stage(x)]
        if self.runs is None:
            y = in_order(pieces, layer.output_order, layer.output_pairs)
        else:
            y = side_by_side(pieces, self.runs)
        return y if bias is None else y + bias

    def _order(self, layer: Any) -> torch.Tensor:
        """Which entry of all that the stages give each output is."""
        orders: dict[Part, torch.Tensor] = {}
        start = 0
        for stage in layer.stages:
            orders |= dict(stage.output_orders(start))
            start += stage.entries
        return torch.cat([orders[part] for part in self.parts])


def split(layer: Any, layouts: Mapping[str, ModuleSpec | None], in_features: int) -> list[Part]:
    """How ``layer`` divides into parts, and its outputs over the ranks."""
    rank, size = layer.tp_rank, layer.tp_size
    ids: tuple[str | int, ...]
    if isinstance(layer, QKVParallelLinear):
        copies = layer.num_kv_head_replicas
        ids = ("q", "k", "v")
        outs = [
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        ]
        places = [(rank, size), (rank // copies, size // copies), (rank // copies, size // copies)]
    elif isinstance(layer, MergedColumnParallelLinear):
        outs = list(layer.output_sizes)
        ids = tuple(range(len(outs)))
        places = [(rank, size)] * len(outs)
    else:
        column = isinstance(layer, ColumnParallelLinear)
        ids, outs, places = (0,), [layer.output_size], [(rank, size) if column else (0, 1)]

    if len(layouts) == 1:  # one Linear, or several that the checkpoint has fused already
        [(name, layout)] = layouts.items()
        ranges, start = [], 0
        for out, (part_rank, part_size) in zip(outs, places, strict=True):
            begin = start + out // part_size * part_rank
            ranges.append((begin, begin + out // part_size))
            start += out
        parts = [Part(name, None, layout, in_features, start, tuple(ranges), rank, size)]
    elif len(layouts) == len(outs):
        parts = [
            Part(name, i, layout, in_features, out, ((out // s * r, out // s * (r + 1)),), r, s)
            for (name, layout), i, out, (r, s) in zip(
                layouts.items(), ids, outs, places, strict=True
            )
        ]
    else:
        raise SchemaError(
            f"{', '.join(layouts)} run as one {type(layer).__name__} with {len(outs)} parts; this "
            "plugin cannot tell which is which. Compress the model again without them."
        )
    for part in parts:
        wanted = (part.out_features, part.in_features)
        if part.layout and (part.layout.out_features, part.layout.in_features) != wanted:
            raise SchemaError(
                f"config.json says that {part.name} is "
                f"{part.layout.out_features}x{part.layout.in_features}, but the model that it "
                f"describes builds it as {wanted[0]}x{wanted[1]}. config.json was edited, or "
                "belongs to another checkpoint."
            )
    return parts
