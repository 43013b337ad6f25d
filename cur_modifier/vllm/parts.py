"""The parts of a vLLM Linear, each as the Linears of its factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from cur_modifier.layout import LayoutError, ModuleLayout
from cur_modifier.vllm.slots import DAMAGED, Slots

__all__ = ["Part", "PartLinear", "make_part"]


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

    @property
    def interpolated(self) -> int:
        """Rows of a row ID's T, over all ranks."""
        assert self.layout is not None
        direct = self.layout.direct_outputs
        return self.out_features - (self.layout.rank if direct is None else direct)


class PartLinear(nn.Module):
    """One or more parts as the Linears they are made of; ``forward`` gives their outputs, in
    pieces."""

    def declare(self, slots: Slots) -> None:
        """Name every tensor of the parts."""
        raise NotImplementedError

    @property
    def entries(self) -> int:
        """Numbers that the pieces hold, for each token."""
        raise NotImplementedError

    def output_orders(self) -> Iterator[tuple[Part, torch.Tensor]]:
        """For each part, which entry of the pieces each of its outputs on this rank is."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError


class SinglePart(PartLinear):
    """A part whose one piece is its outputs in their order."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    @property
    def entries(self) -> int:
        return self.part.width

    def output_orders(self) -> Iterator[tuple[Part, torch.Tensor]]:
        yield self.part, torch.arange(self.part.width)


class DensePart(SinglePart):
    """A part that was not factored, beside one that was."""

    def __init__(self, part: Part, dense: LinearBase) -> None:
        super().__init__(part)
        self.dense = dense

    def declare(self, slots: Slots) -> None:
        slots.declare(self.part, "", self.dense)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.dense(x),)


class CURPart(SinglePart):
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
    """``z = S x`` and ``T z``, for one row ID or for several that share S.

    There is one second stage for all T that are quantized alike, stacked: as a rule one for all.

    Args:
        leader: the part that has S.
        stages: the second stages, each with the parts whose T it holds, in its order, and the rows
            that it has for each of them.
        without: parts that have no T.
    """

    def __init__(
        self,
        leader: Part,
        rank: int,
        s: LinearBase,
        stages: Sequence[tuple[LinearBase, Mapping[Part, int]]],
        without: Sequence[Part],
    ) -> None:
        super().__init__()
        self.leader = leader
        self.id_s = s
        self.id_t = nn.ModuleList(linear for linear, _ in stages)
        self.interpolations = [Interpolation(part, rank) for part in without]
        self._entries = rank
        for linear, rooms in stages:
            for index, (part, room) in enumerate(rooms.items()):
                rows = Interpolation(part, rank, linear, index, room, self._entries)
                self.interpolations.append(rows)
                self._entries += room

    def declare(self, slots: Slots) -> None:
        slots.declare(self.leader, "id_s", self.id_s)
        for each in self.interpolations:
            if each.linear is not None:
                slots.declare(each.part, "id_t", each.linear, each.load)
            slots.add(each.part, "order", each.set_order)

    @property
    def entries(self) -> int:
        return self._entries

    def output_orders(self) -> Iterator[tuple[Part, torch.Tensor]]:
        for each in self.interpolations:
            yield each.part, each.output_order()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = self.id_s(x)
        return z, *[t(z) for t in self.id_t]


class Interpolation:
    """The rows of one part's T within the Linear that holds them.

    Which rows this rank needs is known once the order is. Their number is not known when the
    parameters are made, so there is room for as many as it can be.

    Args:
        linear: None where the part has no T.
        index: of the part among those whose T the Linear holds.
        room: rows that the Linear has for this part.
        start: the entry of the pieces that the first of them computes.
    """

    def __init__(
        self,
        part: Part,
        rank: int,
        linear: LinearBase | None = None,
        index: int = 0,
        room: int = 0,
        start: int = 0,
    ) -> None:
        self.part, self.rank = part, rank
        self.linear, self.index, self.room, self.start = linear, index, room, start
        self._mine: torch.Tensor | None = None  # the entries of the order for this rank's outputs
        self._waiting: list[Callable[[], None]] = []

    @property
    def _whole(self) -> bool:
        """Whether this rank holds all rows of T."""
        return self.room == self.part.interpolated

    def set_order(self, order: torch.Tensor) -> None:
        """Take ``order (m,)`` of the part, and load what waited for it.

        Raises:
            LayoutError: it names entries of ``[z; T z]`` that there are not, or one twice, or not
                every row of T.
        """
        order = order.to("cpu", torch.int64)
        direct = order[order < self.rank]
        rest = order[order >= self.rank].sort().values - self.rank
        if not (
            order.shape == (self.part.out_features,)
            and torch.equal(rest, torch.arange(self.part.interpolated))
            and direct.unique().numel() == direct.numel()
            and (direct >= 0).all()
        ):
            m, rows = self.part.out_features, self.part.interpolated
            what = f"a permutation of the {m} outputs"
            if rows != m - self.rank:
                what = f"each of the {rows} rows of id_t and {m - rows} of the {self.rank} of id_s"
            raise LayoutError(f"{self.part.name}.order is not {what}. {DAMAGED}")
        self._mine = torch.cat([order[start:stop] for start, stop in self.part.outputs])
        for load in self._waiting:
            load()
        self._waiting = []

    def load(self, param: Any, tensor: torch.Tensor) -> None:
        """Load the rows that this rank needs, when it is known which they are."""
        interpolated = self.part.interpolated
        if getattr(param, "output_dim", None) is None:
            self._put(param, tensor)
        elif getattr(param, "packed_dim", None) == param.output_dim:
            self._check_zero_points(param)
            self._put(param, tensor)
        elif len(tensor) != interpolated:
            raise ValueError(f"expected {interpolated} rows")
        elif self._whole:
            self._put(param, tensor)
        elif self._mine is None:
            self._waiting.append(partial(self.load, param, tensor))
        else:
            rows = self._mine[self._mine >= self.rank] - self.rank
            padding = rows.new_zeros(self.room - len(rows))
            self._put(param, tensor[torch.cat([rows, padding])])

    def _put(self, param: Any, tensor: torch.Tensor) -> None:
        shard = (self.index,) if isinstance(self.linear, MergedColumnParallelLinear) else ()
        param.weight_loader(param, tensor, *shard)

    def _check_zero_points(self, param: Any) -> None:
        if not self._whole:
            raise LayoutError(
                f"{self.part.name}.id_t has zero points, which are packed over the outputs and "
                "can't be split over ranks. Serve it with --tensor-parallel-size 1, or quantize "
                "symmetrically."
            )
        stacked = isinstance(self.linear, MergedColumnParallelLinear)
        if stacked and self.room % param.packed_factor:
            raise LayoutError(
                f"{self.part.name}.id_t has {self.room} rows, whose zero points are packed by "
                f"{param.packed_factor}: they can't be stacked with those of the other modules "
                "that share the skeleton. Quantize symmetrically."
            )

    def output_order(self) -> torch.Tensor:
        """Which entry of the pieces each of this rank's outputs is."""
        mine = self._mine
        assert mine is not None  # or the slots would have missed it
        interpolated = mine >= self.rank
        rows = mine - self.rank if self._whole else interpolated.cumsum(0) - 1
        return torch.where(interpolated, self.start + rows, mine)


def make_part(
    layer: LinearBase,
    parts: Sequence[Part],
    inner: QuantizationConfig | None,
    dtype: torch.dtype,
) -> PartLinear:
    """The Linears of a part, or of parts that share a skeleton.

    The first factor is made by the layer's inputs, the last one by its outputs.

    Raises:
        ValueError: a factor that vLLM has no kernel for at this size.
    """
    part = parts[0]
    whole = part.shard_id is None

    def make(kind: type[LinearBase], prefix: str, *sizes: Any, **kwargs: Any) -> LinearBase:
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

    def first(prefix: str, out: int) -> LinearBase:
        if isinstance(layer, RowParallelLinear):
            return make(
                RowParallelLinear,
                prefix,
                part.in_features,
                out,
                reduce_results=False,
                disable_tp=layer.disable_tp,
            )
        return make(ReplicatedLinear, prefix, part.in_features, out)

    def last(prefix: str, rank: int) -> LinearBase:
        if whole and isinstance(layer, QKVParallelLinear):
            return make(
                QKVParallelLinear,
                prefix,
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
                prefix,
                rank,
                list(layer.output_sizes),
                disable_tp=layer.disable_tp,
            )
        if isinstance(layer, ColumnParallelLinear):
            return make(
                ColumnParallelLinear,
                prefix,
                rank,
                part.out_features,
                tp_rank=part.tp_rank,
                tp_size=part.tp_size,
            )
        return make(ReplicatedLinear, prefix, rank, part.out_features)

    def interpolation(rank: int, parts: list[Part]) -> tuple[LinearBase, dict[Part, int]]:
        prefix = f"{parts[0].name}.id_t"
        rooms = {part: min(part.interpolated, part.width) for part in parts}
        if len(rooms) == 1:
            return make(ReplicatedLinear, prefix, rank, rooms[parts[0]]), rooms
        # Kernels ask for round sizes. The sum of all T's rows is round where the rank is, though
        # no T is; so is the sum of all widths. Give the last part what is left.
        everything = min(sum(p.interpolated for p in parts), sum(p.width for p in parts))
        rooms[parts[-1]] += everything - sum(rooms.values())
        sizes = list(rooms.values())
        return make(MergedColumnParallelLinear, prefix, rank, sizes, disable_tp=True), rooms

    if part.layout is None:
        return DensePart(part, last(part.name, part.in_features))
    rank = part.layout.rank
    if part.layout.form == "cur":
        r = first(f"{part.name}.cur_r", rank)
        u = make(ReplicatedLinear, f"{part.name}.cur_u", rank, rank)
        return CURPart(part, part.layout, r, u, last(f"{part.name}.cur_c", rank))
    leader = next(p for p in parts if p.layout and p.layout.shared_skeleton is None)
    return RowIDPart(
        leader,
        rank,
        first(f"{leader.name}.id_s", rank),
        [interpolation(rank, alike) for alike in _by_scheme(layer, parts, inner)],
        [p for p in parts if not p.interpolated],
    )


def _by_scheme(
    layer: LinearBase, parts: Sequence[Part], inner: QuantizationConfig | None
) -> list[list[Part]]:
    """The parts that have a T, those together whose T are quantized alike."""
    groups: list[tuple[Any, list[Part]]] = []
    for part in parts:
        if not part.interpolated:
            continue
        scheme = inner and inner.get_scheme_dict(layer, f"{part.name}.id_t")
        for known, alike in groups:
            if known == scheme:
                alike.append(part)
                break
        else:
            groups.append((scheme, [part]))
    return [alike for _, alike in groups]
