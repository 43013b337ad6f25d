"""Row IDs as they are served, alone or several on one skeleton."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear

from cur_modifier.forms.schema import SchemaError
from cur_modifier.vllm.parts import Part, Schemes
from cur_modifier.vllm.slots import DAMAGED, Slots

from .base import Linears, Served

__all__ = ["SERVED", "RowID"]


class RowID(Served):
    """``[z; T z]`` of ``z = S x`` in permuted order, for one row ID or for several that share S.

    The T of all parts that are quantized alike are stacked: as a rule there is one product for all.
    """

    def __init__(self, parts: Sequence[Part], schemes: Schemes) -> None:
        leader = next(part for part in parts if part.spec and part.spec.shared_skeleton is None)
        assert leader.spec is not None
        super().__init__(parts, (leader, "id_s"), leader.spec.rank)
        interpolated = [part for part in parts if _interpolated(part)]
        self._stacks = [  # of T: the rows that each has for its parts
            _rooms(alike) for alike in schemes.alike(interpolated, lambda part: f"{part.name}.id_t")
        ]
        self._interpolations = [
            Interpolation(part, self.rows) for part in parts if not _interpolated(part)
        ]

    @property
    def direct(self) -> bool:
        return True

    def shapes(self) -> list[list[tuple[int, int]]]:
        return [[(sum(rooms.values()), self.rows)] for rooms in self._stacks]

    def make(self, linears: Linears) -> None:
        start = 0
        for rooms in self._stacks:
            name, sizes = f"{next(iter(rooms)).name}.id_t", list(rooms.values())
            if len(sizes) == 1:
                linear = linears.repeated(name, self.rows, sizes[0])
            else:
                linear = linears.stacked(name, self.rows, sizes)
            self.chains.append([linear])
            for index, (part, room) in enumerate(rooms.items()):
                rows = Interpolation(part, self.rows, linear, index, room, start)
                self._interpolations.append(rows)
                start += room

    def declare(self, slots: Slots) -> None:
        for each in self._interpolations:
            if each.linear is not None:
                slots.declare(each.part, "id_t", each.linear, each.load)
            slots.add(each.part, "order", each.set_order)

    @property
    def entries(self) -> int:
        return sum(sum(rooms.values()) for rooms in self._stacks)

    def output_orders(self, z: int, own: int) -> Iterator[tuple[Part, torch.Tensor]]:
        for each in self._interpolations:
            yield each.part, each.output_order(z, own)

    def check(self, part: Part, key: str, tensor: torch.Tensor) -> None:
        if key == "order":
            _check_order(part, tensor)

    def weights(
        self, tensors: Mapping[Part, Mapping[str, torch.Tensor]], like: torch.Tensor
    ) -> Iterator[tuple[Part, torch.Tensor]]:
        skeleton = tensors[self.first[0]]["id_s.weight"]
        for part in self.parts:
            own, rows = tensors[part], _interpolated(part)
            entries = like.new_empty((self.rows + rows, part.in_features))
            entries[: self.rows] = skeleton
            if rows:
                _multiply(own["id_t.weight"], skeleton, entries[self.rows :])
            order = own["order"]
            in_place = len(entries) == len(order) and bool((order.diff() == 1).all())
            yield part, entries if in_place else entries[order.long()]


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
        return self.room == _interpolated(self.part)

    def set_order(self, order: torch.Tensor) -> None:
        """Take ``order (m,)`` of the part, and load what waited for it.

        Raises:
            SchemaError: as :func:`_check_order`.
        """
        order = _check_order(self.part, order)
        self._mine = torch.cat([order[start:stop] for start, stop in self.part.outputs])
        for load in self._waiting:
            load()
        self._waiting = []

    def load(self, param: Any, tensor: torch.Tensor) -> None:
        """Load the rows that this rank needs, when it is known which they are."""
        interpolated = _interpolated(self.part)
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


def _interpolated(part: Part) -> int:
    """Rows of the part's T, over all ranks."""
    assert part.spec is not None
    rows, _ = part.spec.factor_shapes.get("id_t", (0, 0))
    return rows


def _rooms(parts: Sequence[Part]) -> dict[Part, int]:
    """The rows that one Linear for the T of all ``parts`` has for each on this rank."""
    rooms = {part: min(_interpolated(part), part.width) for part in parts}
    if len(rooms) > 1:
        # Kernels require round sizes. The sum of all T's rows is round where the rank is, though
        # no T is; so is the sum of all widths. Give the last part what is left.
        everything = min(sum(map(_interpolated, parts)), sum(part.width for part in parts))
        rooms[parts[-1]] += everything - sum(rooms.values())
    return rooms


def _check_order(part: Part, order: torch.Tensor) -> torch.Tensor:
    """The order ``(m,)`` of a row ID's outputs, on the CPU.

    Raises:
        SchemaError: it names entries of ``[z; T z]`` that there are not, or one twice, or not every
            row of T.
    """
    assert part.spec is not None
    rank, rows, m = part.spec.rank, _interpolated(part), part.out_features
    order = order.to("cpu", torch.int64)
    direct = order[order < rank]
    rest = order[order >= rank].sort().values - rank
    if not (
        order.shape == (m,)
        and torch.equal(rest, torch.arange(rows))
        and direct.unique().numel() == direct.numel()
        and (direct >= 0).all()
    ):
        what = f"a permutation of the {m} outputs"
        if rows != m - rank:
            what = f"each of the {rows} rows of id_t and {m - rows} of the {rank} of id_s"
        raise SchemaError(f"{part.name}.order is not {what}. {DAMAGED}")
    return order


def _multiply(a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> None:
    """Write ``a b``, summed in float32."""
    # oneDNN sums so. GPUs may round partial sums, and are fast in float32 as well.
    sums_in_float32 = (
        {a.dtype, b.dtype, into.dtype} == {torch.bfloat16}
        and into.device.type == "cpu"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if sums_in_float32:
        torch.mm(a, b, out=into)
    else:
        into.copy_(a.float() @ b.float())


SERVED = RowID
