"""The parts of a vLLM Linear, each as the Linears of its factors.

A part reads ``x`` through a first stage (S, R, or a dense part's whole weight), and what is behind
it is the part's own: T of a row ID, U and C of CUR. Parts whose first stages are quantized alike
have theirs stacked into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import replace_parameter

from cur_modifier.forms.schema import ModuleSpec, SchemaError
from cur_modifier.vllm.slots import DAMAGED, Slots

__all__ = [
    "CHEAP_BYTES",
    "Part",
    "PartFactors",
    "Stage",
    "by_skeleton",
    "check_order",
    "is_cheap_block",
    "is_plain",
    "make_stages",
    "scheme_of",
]


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
    layout: ModuleSpec | None
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


# Above this an entry of T lets the skeleton's rounding show in the other outputs.
_LARGEST_ENTRY = 16.0
# Reading these costs no more than another product: one takes 12 µs on two cores, which read 400 KB
# in that time, and a GPU more.
CHEAP_BYTES = 400_000


class PartFactors:
    """What one part, or several that share a skeleton, are behind the first stage: Linears that
    turn its outputs ``z`` into the rest of the parts' outputs, in pieces.

    Attributes:
        first_stage: of which part, and which child, the first stage's tensors are.
        reads: how many numbers ``z`` has.
        direct: whether they are outputs, or at least are laid out among them.
        whole: whether every rank computes all of ``z``.
        chains: for each piece, the Linears that make it of ``z``, one after another.
    """

    chains: list[list[LinearBase]]

    def __init__(self, part: Part, child: str, reads: int, *, direct: bool) -> None:
        self.first_stage = (part, child)
        self.reads = reads
        self.direct = direct
        self.whole = True
        self.chains = []

    @property
    def first_name(self) -> str:
        """The first stage's name in the checkpoint."""
        part, child = self.first_stage
        return f"{part.name}.{child}" if child else part.name

    def declare(self, slots: Slots) -> None:
        """Name every tensor of the parts but the first stage's."""
        raise NotImplementedError

    def prepare(self, first: torch.Tensor | None) -> None:
        """What is done once, when all is loaded.

        Args:
            first: the first stage's weight ``(reads, n)``, to be changed in place; None where it
                is quantized.
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


def is_cheap_block(upper: Sequence[int], lower: Sequence[int], itemsize: int) -> bool:
    """Whether one product with a block matrix of two of these shapes is cheaper than two."""
    zeros = upper[0] * lower[1] + lower[0] * upper[1]
    return zeros * itemsize <= CHEAP_BYTES


def is_plain(linear: LinearBase) -> bool:
    """Whether nothing is quantized, so that its weight can be read."""
    return isinstance(linear.quant_method, UnquantizedLinearMethod)


class DensePart(PartFactors):
    """A part that was not factored, beside one that was: a first stage alone."""

    def __init__(self, part: Part) -> None:
        super().__init__(part, "", part.width, direct=True)
        self.whole = part.tp_size == 1

    def declare(self, slots: Slots) -> None:
        pass

    def output_orders(self, z: int, own: int) -> Iterator[tuple[Part, torch.Tensor]]:
        yield self.first_stage[0], z + torch.arange(self.reads, device="cpu")


class CURPart(PartFactors):
    """``C (U z)``, of ``z = R x``.

    Where nothing is quantized it is prepared in its compact form, a row ID with ``S = C[I] U R`` in
    R's place and ``T = C[rest] C[I]⁻¹`` in C's: ``r (m + n − r)`` numbers for ``r (m + n + r)``,
    and two products for three. ``I`` are LU pivots of this rank's rows of C. Where they leave large
    entries in T, U is multiplied into C instead.
    """

    def __init__(self, part: Part, u: LinearBase, c: LinearBase) -> None:
        assert part.layout is not None
        compacts = is_plain(u) and is_plain(c) and part.width > part.layout.rank
        super().__init__(part, "cur_r", part.layout.rank, direct=compacts)
        self.part, self.layout = part, part.layout
        self.cur_u, self.cur_c = u, c
        self.chains = [[u, c]]
        # Of the outputs among [z, piece]. vLLM makes Linears under the device that it serves on.
        self._order = self.layout.rank + torch.arange(part.width, device="cpu")
        self._entries = part.width

    def declare(self, slots: Slots) -> None:
        for name in ("cur_u", "cur_c"):
            slots.declare(self.part, name, getattr(self, name))
        for name in ("rows", "columns"):  # say where the factors come from; serving needs neither
            slots.add(self.part, name, lambda tensor: None)
        if self.layout.bias:
            slots.add_bias(self.part, "cur_c.bias")

    def prepare(self, first: torch.Tensor | None) -> None:
        rank = self.layout.rank
        if not self.direct or first is None:
            return
        C, U = self.cur_c.weight.float(), self.cur_u.weight.float()
        lu, pivots, _ = torch.linalg.lu_factor_ex(C)
        rows = list(range(len(C)))
        for step, pivot in enumerate(pivots.tolist()):  # LAPACK records row swaps, one-based
            rows[step], rows[pivot - 1] = rows[pivot - 1], rows[step]
        lower = lu.tril(-1)
        second = torch.linalg.solve_triangular(
            lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
        )
        if bool((second.abs() <= _LARGEST_ENTRY).all()):
            chosen = torch.tensor(rows[:rank], device=C.device)
            first.copy_(C[chosen] @ (U @ first.float()))
            self._order = torch.tensor(rows).argsort()
        else:
            second = C @ U
        self.chains, self._entries = [[self.cur_c]], len(second)
        replace_parameter(self.cur_c, "weight", second.to(self.cur_c.weight.dtype))

    @property
    def entries(self) -> int:
        return self._entries

    def output_orders(self, z: int, own: int) -> Iterator[tuple[Part, torch.Tensor]]:
        order = self._order
        yield self.part, torch.where(order < self.reads, z + order, own - self.reads + order)


class RowIDPart(PartFactors):
    """``T z`` of ``z = S x``, for one row ID or for several that share S.

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
        stages: Sequence[tuple[LinearBase, Mapping[Part, int]]],
        without: Sequence[Part],
    ) -> None:
        super().__init__(leader, "id_s", rank, direct=True)
        self.chains = [[linear] for linear, _ in stages]
        self.interpolations = [Interpolation(part, rank) for part in without]
        self._entries = 0
        for linear, rooms in stages:
            for index, (part, room) in enumerate(rooms.items()):
                rows = Interpolation(part, rank, linear, index, room, self._entries)
                self.interpolations.append(rows)
                self._entries += room

    def declare(self, slots: Slots) -> None:
        for each in self.interpolations:
            if each.linear is not None:
                slots.declare(each.part, "id_t", each.linear, each.load)
            slots.add(each.part, "order", each.set_order)

    @property
    def entries(self) -> int:
        return self._entries

    def output_orders(self, z: int, own: int) -> Iterator[tuple[Part, torch.Tensor]]:
        for each in self.interpolations:
            yield each.part, each.output_order(z, own)


def check_order(part: Part, order: torch.Tensor) -> torch.Tensor:
    """The order ``(m,)`` of a row ID's outputs, on the CPU.

    Raises:
        SchemaError: it names entries of ``[z; T z]`` that there are not, or one twice, or not every
            row of T.
    """
    assert part.layout is not None
    rank = part.layout.rank
    order = order.to("cpu", torch.int64)
    direct = order[order < rank]
    rest = order[order >= rank].sort().values - rank
    if not (
        order.shape == (part.out_features,)
        and torch.equal(rest, torch.arange(part.interpolated))
        and direct.unique().numel() == direct.numel()
        and (direct >= 0).all()
    ):
        m, rows = part.out_features, part.interpolated
        what = f"a permutation of the {m} outputs"
        if rows != m - rank:
            what = f"each of the {rows} rows of id_t and {m - rows} of the {rank} of id_s"
        raise SchemaError(f"{part.name}.order is not {what}. {DAMAGED}")
    return order


class Interpolation:
    """The rows of one part's T within the Linear that holds them.

    Which rows this rank needs is known once the order is. Their number is not known when the
    parameters are made, so there is room for as many as it can be.

    Args:
        linear: None where the part has no T.
        index: of the part among those whose T the Linear holds.
        room: rows that the Linear has for this part.
        start: which entry of the pieces the first of them computes.
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
            SchemaError: as :func:`check_order`.
        """
        order = check_order(self.part, order)
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
            raise SchemaError(
                f"{self.part.name}.id_t has zero points, which are packed over the outputs and "
                "can't be split over ranks. Serve it with --tensor-parallel-size 1, or quantize "
                "symmetrically."
            )
        stacked = isinstance(self.linear, MergedColumnParallelLinear)
        if stacked and self.room % param.packed_factor:
            raise SchemaError(
                f"{self.part.name}.id_t has {self.room} rows, whose zero points are packed by "
                f"{param.packed_factor}: they can't be stacked with those of the other modules "
                "that share the skeleton. Quantize symmetrically."
            )

    def output_order(self, z: int, own: int) -> torch.Tensor:
        """Which entry each of this rank's outputs is, given where z and the pieces begin."""
        mine = self._mine
        assert mine is not None  # or the slots would have missed it
        interpolated = mine >= self.rank
        rows = mine - self.rank if self._whole else interpolated.cumsum(0) - 1
        return torch.where(interpolated, own + self.start + rows, z + mine)


class Stage(nn.Module):
    """Parts that read ``x`` through one product, stacked, and the products behind it.

    Args:
        first: the first stages' Linear.
        parts: in its order; those first whose ``z`` are outputs.
    """

    def __init__(self, first: LinearBase, parts: Sequence[PartFactors]) -> None:
        super().__init__()
        self.first = first
        self.parts = list(parts)
        self._ends = list(accumulate(part.reads for part in parts))
        self.direct = sum(part.reads for part in parts if part.direct)
        self._take_up_chains()

    def declare(self, slots: Slots) -> None:
        """Name every tensor of the parts."""
        for index, each in enumerate(self.parts):
            part, child = each.first_stage
            load = partial(_load_shard, index, each.reads) if len(self.parts) > 1 else None
            slots.declare(part, child, self.first, load)
            each.declare(slots)

    def prepare(self) -> None:
        """What is done once, when all is loaded."""
        for part, end in zip(self.parts, self._ends, strict=True):
            own = slice(end - part.reads, end)
            part.prepare(self.first.weight.data[own] if is_plain(self.first) else None)
        self._take_up_chains(join=True)

    @property
    def entries(self) -> int:
        """Numbers that the pieces hold, for each token."""
        return self.direct + sum(part.entries for part in self.parts)

    def output_orders(self, start: int) -> Iterator[tuple[Part, torch.Tensor]]:
        """For each part, which entry of everything each of its outputs on this rank is.

        Args:
            start: the entry at which this stage's begin.
        """
        own = start + self.direct
        for part, end in zip(self.parts, self._ends, strict=True):
            yield from part.output_orders(start + end - part.reads, own)
            own += part.entries

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
        """What is behind the first stage, by piece; ``join`` makes block matrices of some."""
        self._chains: list[list[LinearBase]] = []
        self._reads: list[slice] = []  # of z, by each chain
        for part, end in zip(self.parts, self._ends, strict=True):
            for chain in part.chains:
                reads = slice(end - part.reads, end)
                if not (join and self._joined(chain, reads)):
                    self._chains.append(chain)
                    self._reads.append(reads)
        self.second = nn.ModuleList(nn.ModuleList(chain) for chain in self._chains)

    def _joined(self, chain: list[LinearBase], reads: slice) -> bool:
        """Put a chain into one block matrix with the one before it, where that is cheaper."""
        if not self._chains or self._reads[-1].stop != reads.start:
            return False
        before = self._chains[-1]
        if not all(len(one) == 1 and is_plain(one[0]) for one in (before, chain)):
            return False
        upper, lower = before[0].weight, chain[0].weight
        if not is_cheap_block(upper.shape, lower.shape, upper.itemsize):
            return False
        replace_parameter(before[0], "weight", torch.block_diag(upper, lower))
        self._reads[-1] = slice(self._reads[-1].start, reads.stop)
        return True


def _load_shard(index: int, rows: int, param: Any, tensor: torch.Tensor) -> None:
    output_dim = getattr(param, "output_dim", None)
    if output_dim is not None:
        if getattr(param, "packed_dim", None) == output_dim:
            rows //= param.packed_factor
        if tensor.shape[output_dim] != rows:  # vLLM's own loader would take a part of it
            raise ValueError(f"expected {rows} rows")
    param.weight_loader(param, tensor, index)


def make_stages(
    layer: LinearBase,
    parts: Sequence[Part],
    inner: QuantizationConfig | None,
    dtype: torch.dtype,
) -> list[Stage]:
    """The Linears of all parts of a layer.

    First factors are made by the layer's inputs, last ones by its outputs.

    Raises:
        ValueError: a factor that vLLM has no kernel for at this size.
    """
    make = _Factory(layer, inner, dtype)
    runs = [make.part(together) for together in by_skeleton(parts)]
    return [make.stage(together) for together in make.stackable(runs)]


def by_skeleton(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts, those together that share a skeleton."""
    together: dict[str, list[Part]] = {}
    for part in parts:
        leader = part.layout.shared_skeleton if part.layout else None
        together.setdefault(leader or part.name, []).append(part)
    return list(together.values())


def scheme_of(inner: QuantizationConfig | None, layer: LinearBase, name: str) -> Any:
    """How compressed-tensors quantizes the Linear ``name`` below ``layer``; None where it does
    not."""
    return inner and inner.get_scheme_dict(layer, name)


@dataclass(frozen=True)
class _Factory:
    """Makes the Linears below one Linear of vLLM's."""

    layer: LinearBase
    inner: QuantizationConfig | None
    dtype: torch.dtype

    def part(self, parts: Sequence[Part]) -> PartFactors:
        """A part, or those that share a skeleton, behind the first stage."""
        part = parts[0]
        if part.layout is None:
            return DensePart(part)
        rank = part.layout.rank
        if part.layout.form == "cur":
            u = self.make(ReplicatedLinear, f"{part.name}.cur_u", rank, rank)
            return CURPart(part, u, self.last(part, f"{part.name}.cur_c", rank))
        leader = next(p for p in parts if p.layout and p.layout.shared_skeleton is None)
        interpolated = [p for p in parts if p.interpolated]
        return RowIDPart(
            leader,
            rank,
            [
                self.interpolation(rank, alike)
                for alike in self.alike(interpolated, lambda p: f"{p.name}.id_t")
            ],
            [p for p in parts if not p.interpolated],
        )

    def stackable(self, runs: Sequence[PartFactors]) -> list[list[PartFactors]]:
        """The runs, those together whose first stages make one; with direct ones first."""
        if isinstance(self.layer, RowParallelLinear):
            return [[run] for run in runs]
        ordered = sorted(runs, key=lambda run: not run.direct)
        alone = [[run] for run in ordered if not run.whole]
        groups = self.alike([run for run in ordered if run.whole], lambda run: run.first_name)
        return alone + [part for group in groups for part in self._with_kernel(group)]

    def _with_kernel(self, runs: list[PartFactors]) -> list[list[PartFactors]]:
        """The runs as one group where their parameters can be stacked, else one by one."""
        scheme = self.scheme(runs[0].first_name)
        weights = scheme and scheme.get("weights")
        if weights is not None:
            # An order of the inputs is each weight's own. Zero points are packed by the outputs.
            own_order = str(getattr(weights, "actorder", None) or "").endswith("group")
            packed = not weights.symmetric and any(run.reads % 8 for run in runs)
            if own_order or packed:
                return [[run] for run in runs]
        return [runs]

    def stage(self, runs: Sequence[PartFactors]) -> Stage:
        """The first stage of the runs, and what is behind it."""
        part, name = runs[0].first_stage[0], runs[0].first_name
        n, reads = part.in_features, [run.reads for run in runs]
        if len(runs) > 1:
            first = self.make(MergedColumnParallelLinear, name, n, reads, disable_tp=True)
        elif isinstance(runs[0], DensePart):
            first = self.last(part, name, n)
        elif isinstance(self.layer, RowParallelLinear):
            first = self.make(
                RowParallelLinear,
                name,
                n,
                *reads,
                reduce_results=False,
                disable_tp=self.layer.disable_tp,
            )
        else:
            first = self.make(ReplicatedLinear, name, n, *reads)
        return Stage(first, runs)

    def make(self, kind: type[LinearBase], prefix: str, *sizes: Any, **kwargs: Any) -> LinearBase:
        layer = self.layer
        try:
            return kind(
                *sizes,
                bias=False,
                params_dtype=self.dtype,
                quant_config=self.inner,
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

    def last(self, part: Part, prefix: str, inputs: int) -> LinearBase:
        """The Linear that computes a part's outputs on this rank."""
        layer, whole = self.layer, part.shard_id is None
        if whole and isinstance(layer, QKVParallelLinear):
            return self.make(
                QKVParallelLinear,
                prefix,
                inputs,
                layer.head_size,
                layer.total_num_heads,
                layer.total_num_kv_heads,
                v_head_size=layer.v_head_size,
                disable_tp=layer.disable_tp,
            )
        if whole and isinstance(layer, MergedColumnParallelLinear):
            return self.make(
                MergedColumnParallelLinear,
                prefix,
                inputs,
                list(layer.output_sizes),
                disable_tp=layer.disable_tp,
            )
        if isinstance(layer, ColumnParallelLinear):
            return self.make(
                ColumnParallelLinear,
                prefix,
                inputs,
                part.out_features,
                tp_rank=part.tp_rank,
                tp_size=part.tp_size,
            )
        return self.make(ReplicatedLinear, prefix, inputs, part.out_features)

    def interpolation(self, rank: int, parts: list[Part]) -> tuple[LinearBase, dict[Part, int]]:
        """The Linear of T, stacked for all the parts, and the rows that it has for each."""
        prefix = f"{parts[0].name}.id_t"
        rooms = {part: min(part.interpolated, part.width) for part in parts}
        if len(rooms) == 1:
            return self.make(ReplicatedLinear, prefix, rank, rooms[parts[0]]), rooms
        # Kernels ask for round sizes. The sum of all T's rows is round where the rank is, though
        # no T is; so is the sum of all widths. Give the last part what is left.
        everything = min(sum(p.interpolated for p in parts), sum(p.width for p in parts))
        rooms[parts[-1]] += everything - sum(rooms.values())
        sizes = list(rooms.values())
        return self.make(MergedColumnParallelLinear, prefix, rank, sizes, disable_tp=True), rooms

    def scheme(self, name: str) -> Any:
        """As :func:`scheme_of`."""
        return scheme_of(self.inner, self.layer, name)

    def alike(self, items: Sequence[Any], name: Callable[[Any], str]) -> list[list[Any]]:
        """The items, those together whose Linears are quantized alike."""
        groups: list[tuple[Any, list[Any]]] = []
        for item in items:
            scheme = self.scheme(name(item))
            for known, alike in groups:
                if known == scheme:
                    alike.append(item)
                    break
            else:
                groups.append((scheme, [item]))
        return [alike for _, alike in groups]
