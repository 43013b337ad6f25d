"""The parts of a vLLM Linear: the checkpoint Linears that it fuses, what each computes on
this rank, and how compressed-tensors quantizes their factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from cur_modifier.forms.schema import ModuleSpec, SchemaError

__all__ = ["Part", "Schemes", "by_skeleton", "split"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """One checkpoint Linear within the Linear that vLLM runs.

    Attributes:
        name: in the checkpoint.
        shard_id: by which vLLM's loaders tell this part's tensors; None where it is the whole.
        spec: None for a dense part.
        in_features, out_features: of the whole part, over all ranks.
        outputs: half-open ranges of the outputs that this rank computes.
        tp_rank, tp_size: this rank's place in the split of the outputs; key and value heads that
            are repeated make it coarser than the model's.
    """

    name: str
    shard_id: str | int | None
    spec: ModuleSpec | None
    in_features: int
    out_features: int
    outputs: tuple[tuple[int, int], ...]
    tp_rank: int
    tp_size: int

    @property
    def width(self) -> int:
        """Outputs that this rank computes."""
        return sum(stop - start for start, stop in self.outputs)


def split(layer: Any, specs: Mapping[str, ModuleSpec | None], in_features: int) -> list[Part]:
    """Divide ``layer`` into its parts, and their outputs over the ranks.

    Args:
        specs: of the parts by checkpoint name, in the order of their outputs; None for a dense one.

    Raises:
        SchemaError: parts that cannot be told apart, or a shape that disagrees with the model's.
    """
    ids, outs, places = _shards(layer)
    if len(specs) == 1:  # one Linear, or several that the checkpoint has fused already
        [(name, spec)] = specs.items()
        ranges, start = [], 0
        for out, (part_rank, part_size) in zip(outs, places, strict=True):
            begin = start + out // part_size * part_rank
            ranges.append((begin, begin + out // part_size))
            start += out
        rank, size = layer.tp_rank, layer.tp_size
        parts = [Part(name, None, spec, in_features, start, tuple(ranges), rank, size)]
    elif len(specs) == len(outs):
        parts = [
            Part(name, i, spec, in_features, out, ((out // s * r, out // s * (r + 1)),), r, s)
            for (name, spec), i, out, (r, s) in zip(specs.items(), ids, outs, places, strict=True)
        ]
    else:
        raise SchemaError(
            f"{', '.join(specs)} run as one {type(layer).__name__} with {len(outs)} parts; this "
            "plugin cannot tell which is which. Compress the model again without them."
        )
    for part in parts:
        wanted = (part.out_features, part.in_features)
        if part.spec and (part.spec.out_features, part.spec.in_features) != wanted:
            raise SchemaError(
                f"config.json says that {part.name} is "
                f"{part.spec.out_features}x{part.spec.in_features}, but the model that it "
                f"describes builds it as {wanted[0]}x{wanted[1]}. config.json was edited, or "
                "belongs to another checkpoint."
            )
    return parts


def _shards(layer: Any) -> tuple[tuple[str | int, ...], list[int], list[tuple[int, int]]]:
    """What vLLM fuses in ``layer``: shard ids, outputs over all ranks, and this rank's place in the
    split of each: ``(rank, size)``."""
    rank, size = layer.tp_rank, layer.tp_size
    if isinstance(layer, QKVParallelLinear):
        copies = layer.num_kv_head_replicas
        outs = [
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        ]
        key_value = (rank // copies, size // copies)
        return ("q", "k", "v"), outs, [(rank, size), key_value, key_value]
    if isinstance(layer, MergedColumnParallelLinear):
        outs = list(layer.output_sizes)
        return tuple(range(len(outs))), outs, [(rank, size)] * len(outs)
    column = isinstance(layer, ColumnParallelLinear)
    return (0,), [layer.output_size], [(rank, size) if column else (0, 1)]


def by_skeleton(parts: Sequence[Part]) -> list[list[Part]]:
    """Group the parts that share a skeleton; any other part is a group of its own."""
    together: dict[str, list[Part]] = {}
    for part in parts:
        leader = part.spec.shared_skeleton if part.spec else None
        together.setdefault(leader or part.name, []).append(part)
    return list(together.values())


@dataclass(frozen=True)
class Schemes:
    """How compressed-tensors quantizes the Linears below one of vLLM's.

    Attributes:
        inner: compressed-tensors' config; None where nothing is quantized.
        layer: the Linear that vLLM's model class made.
    """

    inner: QuantizationConfig | None
    layer: LinearBase

    def of(self, name: str) -> Any:
        """The scheme of the checkpoint's Linear ``name``; None where it is not quantized."""
        return self.inner and self.inner.get_scheme_dict(self.layer, name)

    def alike(self, items: Sequence[Item], name: Callable[[Item], str]) -> list[list[Item]]:
        """Group the items whose Linears, of the given names, are quantized alike."""
        groups: list[tuple[Any, list[Item]]] = []
        for item in items:
            scheme = self.of(name(item))
            for known, alike in groups:
                if known == scheme:
                    alike.append(item)
                    break
            else:
                groups.append((scheme, [item]))
        return [alike for _, alike in groups]

    def are_plain(self, parts: Sequence[Part]) -> bool:
        """Whether no factor of the parts, and no dense one among them, is quantized."""
        return all(
            self.of(f"{part.name}.{child}" if child else part.name) is None
            for part in parts
            for child in (part.spec.factor_shapes if part.spec else [""])
        )
