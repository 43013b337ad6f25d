"""How vLLM runs a Linear that has factored parts: q, k, v each dense, CUR or ID, and so on.

Below the Linear that vLLM's model class makes stand ordinary vLLM Linears, one for each factor and
one for each dense part. vLLM's own schemes give them their parameters, load them, split them over
ranks and choose their kernels, each by its name in the checkpoint.

Tensor parallelism. A column-parallel Linear splits the last factor (C or T) by outputs and repeats
the first (R or S), since every rank needs all of ``z``. A row-parallel Linear splits the first
factor by inputs; the others act on partial sums, and the reduction that vLLM does anyway adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from cur_modifier.layout import LayoutError, ModuleLayout

if TYPE_CHECKING:
    from cur_modifier.vllm.config import CURQuantizationConfig

__all__ = ["FactoredLinearMethod"]

DAMAGED = "The files were changed or damaged: download or save the checkpoint again."


@dataclass(frozen=True)
class Part:
    """One checkpoint Linear within the Linear that vLLM runs.

    Attributes:
        name: in the checkpoint.
        shard_id: by which vLLM's loaders tell this part's tensors; None where it is the whole.
        layout: None for a dense part.
        in_features, out_features: of the whole part, over all ranks.
        outputs: half-open ranges of the outputs that this rank computes.
        tp_rank, tp_size: this rank's place in the split of the outputs; key and value heads that
            are repeated make it coarser than the model's.
    """

    name: str
    shard_id: str | int | None
    layout: ModuleLayout | None
    in_features: int
    out_features: int
    outputs: tuple[tuple[int, int], ...]
    tp_rank: int
    tp_size: int

    @property
    def width(self) -> int:
        """Outputs that this rank computes."""
        return sum(stop - start for start, stop in self.outputs)


class FactoredLinearMethod(LinearMethodBase):
    """The linear method of one vLLM Linear with at least one factored part.

    Args:
        layouts: the parts by checkpoint name, in the order of their outputs; None for a dense one.
        config: of the checkpoint; its ``inner`` says how factors and dense parts are quantized.
    """

    def __init__(
        self, layouts: Mapping[str, ModuleLayout | None], config: CURQuantizationConfig
    ) -> None:
        self.layouts = layouts
        self.config = config

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
            LayoutError: a shape that disagrees with the model's, or a Linear that vLLM splits in a
                way this plugin does not know.
            ValueError: a factor that vLLM has no kernel for at this size.
        """
        parts = split(layer, self.layouts, input_size)
        widths = [part.width for part in parts]
        if sum(widths) != sum(output_partition_sizes):
            raise LayoutError(
                f"{parts[0].name}: vLLM gives this rank {sum(output_partition_sizes)} outputs of a "
                f"{type(layer).__name__}, and this plugin expected {sum(widths)}. It does not know "
                "how that layer is split. Upgrade it: pip install -U cur-modifier"
            )
        layer.parts = nn.ModuleList()
        layer.register_buffer("output_order", None, persistent=False)
        slots = Slots(layer)
        for part in parts:
            runs = make_part(layer, part, self.config.inner, params_dtype)
            layer.parts.append(runs)
            runs.declare(slots)
        self.slots = slots

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the slots away, and note the order of the outputs.

        vLLM calls this before it prepares the kernels of the Linears below.

        Raises:
            LayoutError: a tensor that never came, or a factored module that no Linear stands for.
        """
        self.config.check_claimed()
        self.slots.close()
        orders, start = [], 0
        for part in layer.parts:
            orders.append(part.output_order() + start)
            start += part.entries
        order = torch.cat(orders)
        if not torch.equal(order, torch.arange(start)):
            device = next(layer.parameters()).device
            layer.output_order = order.to(device)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        pieces = [piece for part in layer.parts for piece in part(x)]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        if layer.output_order is not None:
            y = y.index_select(-1, layer.output_order)
        return y if bias is None else y + bias


def split(layer: Any, layouts: Mapping[str, ModuleLayout | None], in_features: int) -> list[Part]:
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
        raise LayoutError(
            f"{', '.join(layouts)} run as one {type(layer).__name__} with {len(outs)} parts; this "
            "plugin cannot tell which is which. Compress the model again without them."
        )
    for part in parts:
        wanted = (part.out_features, part.in_features)
        if part.layout and (part.layout.out_features, part.layout.in_features) != wanted:
            raise LayoutError(
                f"config.json says that {part.name} is "
                f"{part.layout.out_features}x{part.layout.in_features}, but the model that it "
                f"describes builds it as {wanted[0]}x{wanted[1]}. config.json was edited, or "
                "belongs to another checkpoint."
            )
    return parts


def make_part(
    layer: LinearBase, part: Part, inner: QuantizationConfig | None, dtype: torch.dtype
) -> PartLinear:
    """The Linears of ``part``: first factor by the layer's inputs, last one by its outputs."""
    whole = part.shard_id is None

    def make(kind: type[LinearBase], child: str, *sizes: Any, **kwargs: Any) -> LinearBase:
        prefix = f"{part.name}.{child}" if child else part.name
        try:
            return kind(
                *sizes,
                bias=False,
                params_dtype=dtype,
                quant_config=inner,
                prefix=prefix,
                return_bias=False,
                **kwargs,
            )
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise ValueError(
                f"{prefix} ({sizes} on {layer.tp_size} ranks) has no kernel in this vLLM: {error} "
                "Serve it with a smaller --tensor-parallel-size, or compress it again with a "
                "group_size and multiple_of that divide these sizes."
            ) from error

    def first(child: str, out: int) -> LinearBase:
        if isinstance(layer, RowParallelLinear):
            return make(
                RowParallelLinear,
                child,
                part.in_features,
                out,
                reduce_results=False,
                disable_tp=layer.disable_tp,
            )
        return make(ReplicatedLinear, child, part.in_features, out)

    def last(child: str, rank: int) -> LinearBase:
        if whole and isinstance(layer, QKVParallelLinear):
            return make(
                QKVParallelLinear,
                child,
                rank,
                layer.head_size,
                layer.total_num_heads,
                layer.total_num_kv_heads,
                v_head_size=layer.v_head_size,
                disable_tp=layer.disable_tp,
            )
        if whole and isinstance(layer, MergedColumnParallelLinear):
            return make(
                MergedColumnParallelLinear,
                child,
                rank,
                list(layer.output_sizes),
                disable_tp=layer.disable_tp,
            )
        if isinstance(layer, ColumnParallelLinear):
            return make(
                ColumnParallelLinear,
                child,
                rank,
                part.out_features,
                tp_rank=part.tp_rank,
                tp_size=part.tp_size,
            )
        return make(ReplicatedLinear, child, rank, part.out_features)

    if part.layout is None:
        return DensePart(part, last("", part.in_features))
    rank = part.layout.rank
    if part.layout.form == "cur":
        r = first("cur_r", rank)
        u = make(ReplicatedLinear, "cur_u", rank, rank)
        return CURPart(part, part.layout, r, u, last("cur_c", rank))
    interpolated = part.out_features - rank
    t = make(ReplicatedLinear, "id_t", rank, min(interpolated, part.width))
    return RowIDPart(part, part.layout, first("id_s", rank), t)


class PartLinear(nn.Module):
    """One part as the Linears it is made of; ``forward`` gives its outputs, in pieces."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def declare(self, slots: Slots) -> None:
        """Name every tensor of the part."""
        raise NotImplementedError

    @property
    def entries(self) -> int:
        """Numbers that the pieces hold, for each token."""
        return self.part.width

    def output_order(self) -> torch.Tensor:
        """Which entry of the pieces each of this rank's outputs is."""
        return torch.arange(self.part.width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError


class DensePart(PartLinear):
    """A part that was not factored, beside one that was."""

    def __init__(self, part: Part, dense: LinearBase) -> None:
        super().__init__(part)
        self.dense = dense

    def declare(self, slots: Slots) -> None:
        slots.declare(self.part, "", self.dense)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.dense(x),)


class CURPart(PartLinear):
    """``C (U (R x))``, as stored."""

    def __init__(
        self, part: Part, layout: ModuleLayout, r: LinearBase, u: LinearBase, c: LinearBase
    ) -> None:
        super().__init__(part)
        self.layout = layout
        self.cur_r, self.cur_u, self.cur_c = r, u, c

    def declare(self, slots: Slots) -> None:
        for name in ("cur_r", "cur_u", "cur_c"):
            slots.declare(self.part, name, getattr(self, name))
        for name in ("rows", "columns"):  # say where the factors come from; serving needs neither
            slots.add(self.part, name, lambda tensor: None)
        if self.layout.bias:
            slots.add_bias(self.part, "cur_c.bias")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.cur_c(self.cur_u(self.cur_r(x))),)


class RowIDPart(PartLinear):
    """``z = S x`` and ``T z``; the order puts them where they belong.

    The rows of T that this rank needs are known once the order is. Their number is not known when
    the parameters are made, so there is room for as many as it can be.
    """

    def __init__(self, part: Part, layout: ModuleLayout, s: LinearBase, t: LinearBase) -> None:
        super().__init__(part)
        self.layout = layout
        self.id_s, self.id_t = s, t
        self._mine: torch.Tensor | None = None  # the entries of the order for this rank's outputs
        self._waiting: list[Callable[[], None]] = []

    def declare(self, slots: Slots) -> None:
        slots.declare(self.part, "id_s", self.id_s)
        slots.declare(self.part, "id_t", self.id_t, self._load_rows)
        slots.add(self.part, "order", self._set_order)

    @property
    def _whole(self) -> bool:
        """Whether this rank holds all rows of T."""
        return self.id_t.output_size == self.part.out_features - self.layout.rank

    def _set_order(self, order: torch.Tensor) -> None:
        order = order.to("cpu", torch.int64)
        if not torch.equal(order.sort().values, torch.arange(self.part.out_features)):
            raise LayoutError(
                f"{self.part.name}.order is not a permutation of the {self.part.out_features} "
                f"outputs. {DAMAGED}"
            )
        self._mine = torch.cat([order[start:stop] for start, stop in self.part.outputs])
        for load in self._waiting:
            load()
        self._waiting = []

    def _load_rows(self, param: Any, tensor: torch.Tensor) -> None:
        """Load the rows that this rank needs, when it is known which they are."""
        if self._whole or getattr(param, "output_dim", None) is None:
            self.id_t.weight_loader(param, tensor)
        elif getattr(param, "packed_dim", None) == param.output_dim:
            raise LayoutError(
                f"{self.part.name}.id_t has zero points, which are packed over the outputs and "
                "can't be split over ranks. Serve it with --tensor-parallel-size 1, or quantize "
                "symmetrically."
            )
        elif len(tensor) != self.part.out_features - self.layout.rank:
            raise ValueError(f"expected {self.part.out_features - self.layout.rank} rows")
        elif self._mine is None:
            self._waiting.append(partial(self._load_rows, param, tensor))
        else:
            rows = self._mine[self._mine >= self.layout.rank] - self.layout.rank
            padding = rows.new_zeros(self.id_t.output_size - len(rows))
            self.id_t.weight_loader(param, tensor[torch.cat([rows, padding])])

    @property
    def entries(self) -> int:
        return self.layout.rank + self.id_t.output_size

    def output_order(self) -> torch.Tensor:
        rank, mine = self.layout.rank, self._mine
        assert mine is not None  # or the slots would have missed it
        if self._whole:
            return mine
        interpolated = mine >= rank
        return torch.where(interpolated, rank + interpolated.cumsum(0) - 1, mine)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = self.id_s(x)
        return z, self.id_t(z)


class Slots:
    """Where vLLM's loaders find the checkpoint's tensors of one Linear.

    vLLM looks up ``q_proj.cur_c.weight`` as ``qkv_proj.cur_c.weight`` and hands over a shard id.
    So each name is an empty parameter whose loader passes the tensor on by that id. All are gone
    after loading.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.loaders: dict[str, dict[Any, tuple[str, Callable[[torch.Tensor], None]]]] = {}
        self.missing: set[str] = set()

    def declare(
        self,
        part: Part,
        child: str,
        linear: LinearBase,
        load: Callable[[nn.Parameter, torch.Tensor], None] | None = None,
    ) -> None:
        """A slot for every parameter of ``linear``."""
        for name, param in linear.named_parameters(recurse=False):
            key = f"{child}.{name}" if child else name
            loader = load or param.weight_loader
            self.add(part, key, partial(_load, part, key, linear, loader, param), param.dtype)

    def add(
        self,
        part: Part,
        key: str,
        load: Callable[[torch.Tensor], None],
        dtype: torch.dtype = torch.int32,
    ) -> None:
        """A slot for ``<part>.<key>``."""
        if key not in self.loaders:
            self.loaders[key] = {}
            slot = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(slot, {"weight_loader": partial(self._receive, key)})
            holder, _, name = key.rpartition(".")
            if holder and not hasattr(self.layer, holder):
                self.layer.add_module(holder, nn.Module())
            self.layer.get_submodule(holder).register_parameter(name, slot)
        self.loaders[key][part.shard_id] = (part.name, load)
        self.missing.add(f"{part.name}.{key}")

    def add_bias(self, part: Part, key: str) -> None:
        """A slot that hands a factor's bias to the layer's, which vLLM makes after the weights."""
        shard = () if part.shard_id is None else (part.shard_id,)

        def load(tensor: torch.Tensor) -> None:
            bias = self.layer.bias
            if bias is None:
                raise LayoutError(
                    f"config.json says that {part.name} has a bias, and vLLM's model has none "
                    "there. config.json was edited, or belongs to another checkpoint."
                )
            bias.weight_loader(bias, tensor, *shard)

        self.add(part, key, load)

    def _receive(
        self, key: str, slot: nn.Parameter, tensor: torch.Tensor, shard_id: Any = None
    ) -> None:
        if shard_id not in self.loaders[key]:
            known = ", ".join(name for name, _ in self.loaders[key].values())
            raise LayoutError(
                f"the checkpoint has a '{key}' for shard {shard_id!r} of {self.layer.prefix}; "
                f"config.json gives one to {known} only. {DAMAGED}"
            )
        name, load = self.loaders[key][shard_id]
        load(tensor)
        self.missing.discard(f"{name}.{key}")

    def close(self) -> None:
        """Remove the slots.

        Raises:
            LayoutError: a tensor that never came; it would be served as noise.
        """
        if self.missing:
            raise LayoutError(
                f"{sorted(self.missing)[0]} is missing from the checkpoint"
                f"{f' (and {len(self.missing) - 1} more)' if len(self.missing) > 1 else ''}. "
                "Download or save it again."
            )
        for key in self.loaders:
            holder, _, name = key.rpartition(".")
            if not holder:
                delattr(self.layer, name)
            elif hasattr(self.layer, holder):
                delattr(self.layer, holder)
        self.loaders = {}


def _load(
    part: Part,
    key: str,
    linear: LinearBase,
    loader: Callable[..., None],
    param: nn.Parameter,
    tensor: torch.Tensor,
) -> None:
    """Load one tensor, or say which it was that did not fit."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise LayoutError(f"{part.name}.{key} holds numbers that are not finite. {DAMAGED}")
    # The layer above has marked the parameters of all below it with its own rank and size.
    linear.update_param_tp_status()
    try:
        loader(param, tensor)
    except LayoutError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise LayoutError(
            f"{part.name}.{key} has shape {tuple(tensor.shape)}, which does not fit config.json "
            f"({error}). {DAMAGED}"
        ) from error
