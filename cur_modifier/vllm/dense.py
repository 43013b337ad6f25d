"""Linears whose factors are multiplied out as they are loaded.

Where the factors of a small layer save fewer bytes than could be read in the time that their
additional products take, the layer is served as the dense one that it was: as fast, and as large in
memory. Which layers those are is known from their shapes, so no Linears are made for their factors,
and vLLM's own loaders split the product over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from cur_modifier.forms.schema import SchemaError
from cur_modifier.vllm.parts import (
    CHEAP_BYTES,
    Part,
    by_skeleton,
    check_order,
    is_cheap_block,
    scheme_of,
)
from cur_modifier.vllm.slots import DAMAGED, Slots, check_finite

__all__ = ["DenseWeight", "are_plain", "as_factors", "save_too_little"]

_Tensors = dict[Part, dict[str, torch.Tensor]]  # of parts that share a skeleton, or of one


def are_plain(parts: Sequence[Part], layer: LinearBase, inner: QuantizationConfig | None) -> bool:
    """Whether no factor of the parts, and no dense one among them, is quantized."""
    return all(
        scheme_of(inner, layer, f"{part.name}.{child}" if child else part.name) is None
        for part in parts
        for child in (part.layout.factor_shapes if part.layout else [""])
    )


def save_too_little(parts: Sequence[Part], inputs: int, itemsize: int) -> bool:
    """Whether one dense product would be faster than those of the factors, none of them quantized.

    Args:
        inputs: of the layer on this rank.
        itemsize: bytes of a number.
    """
    numbers, products = as_factors(parts, inputs, itemsize)
    dense = sum(part.width for part in parts) * inputs
    return (dense - numbers) * itemsize < (products - 1) * CHEAP_BYTES


def as_factors(parts: Sequence[Part], inputs: int, itemsize: int) -> tuple[int, int]:
    """How many numbers the products read where the factors are kept, and how many products there
    are. Arguments as :func:`save_too_little`."""
    numbers, products = 0, 0
    stacked = False  # whether there is a first stage that all ranks have whole
    reads = 0  # numbers of z so far
    block = (0, 0, -1)  # rows, columns and end in z of what the next second factor may join
    for together in by_skeleton(parts):
        part = together[0]
        if part.layout is None:
            numbers += part.width * inputs
            if part.tp_size > 1:
                products += 1
            else:
                stacked, reads = True, reads + part.width
            continue
        stacked, rank = True, part.layout.rank
        numbers += rank * inputs
        reads += rank
        if part.layout.form == "id":
            rows = sum(min(each.interpolated, each.width) for each in together)
        elif part.width > rank:
            rows = part.width - rank  # in its compact form
        else:
            rows = part.width
            numbers, products = numbers + rank * rank, products + 1
        if not rows:
            continue
        above, columns, end = block
        if end == reads - rank and is_cheap_block((above, columns), (rows, rank), itemsize):
            numbers += (above + rows) * (columns + rank) - above * columns
            block = (above + rows, columns + rank, reads)
        else:
            numbers, products = numbers + rows * rank, products + 1
            block = (rows, rank, reads)
    return numbers, products + stacked


class DenseWeight:
    """The weight of a layer, made of its parts' factors as they arrive.

    Args:
        layer: the Linear that vLLM's model class made.
        slots: which get a slot for every tensor of the parts.
        arguments: of ``create_weights``, behind the layer.
    """

    def __init__(self, layer: Any, parts: Sequence[Part], slots: Slots, **arguments: Any) -> None:
        self.method = UnquantizedLinearMethod()
        self.method.create_weights(layer, **arguments)
        # Until it is whole the name is a slot's: dense parts are loaded under it, too.
        self.weight = layer._parameters.pop("weight")
        for together in by_skeleton(parts):
            found: _Tensors = {part: {} for part in together}
            for part in together:
                for key, shape in _shapes(part).items():
                    take = partial(self._take, found, part, key, shape)
                    slots.add(
                        part, key, take, torch.int32 if len(shape) == 1 else self.weight.dtype
                    )
                if part.layout and part.layout.bias and part.layout.form == "cur":
                    slots.add_bias(part, "cur_c.bias")

    def _take(
        self, found: _Tensors, part: Part, key: str, shape: tuple[int, ...], tensor: torch.Tensor
    ) -> None:
        """Keep a tensor; with the last one of those that share a skeleton, load their weights."""
        if tuple(tensor.shape) != shape:
            raise SchemaError(
                f"{part.name}.{key} has shape {tuple(tensor.shape)}, which does not fit "
                f"config.json (expected {shape}). {DAMAGED}"
            )
        check_finite(part, key, tensor)
        if key == "order":
            check_order(part, tensor)
        found[part][key] = tensor.to(self.weight.device)
        if any(found[each].keys() != _shapes(each).keys() for each in found):
            return
        skeletons = [own["id_s.weight"] for own in found.values() if "id_s.weight" in own]
        for each, own in found.items():
            weight = self._product(each, own, *skeletons)
            shard = () if each.shard_id is None else (each.shard_id,)
            self.weight.weight_loader(self.weight, weight, *shard)
        found.clear()

    def _product(
        self, part: Part, own: dict[str, torch.Tensor], skeleton: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The dense weight ``(m, n)`` of a part, each number rounded once."""
        if part.layout is None:
            return own["weight"]
        if skeleton is None:
            c, u, r = (own[f"cur_{name}.weight"].float() for name in "cur")
            return c @ (u @ r)
        rank, order = part.layout.rank, own["order"]
        entries = self.weight.new_empty((rank + part.interpolated, part.in_features))
        entries[:rank] = skeleton
        if part.interpolated:
            multiply(own["id_t.weight"], skeleton, entries[rank:])
        in_place = len(entries) == len(order) and bool((order.diff() == 1).all())
        return entries if in_place else entries[order.long()]

    def finish(self, layer: Any) -> None:
        """Give the layer its weight, and let vLLM choose the kernel."""
        layer.register_parameter("weight", self.weight)
        del self.weight  # of which vLLM packs a copy and drops this
        self.method.process_weights_after_loading(layer)


def _shapes(part: Part) -> dict[str, tuple[int, ...]]:
    """The tensors that make a part's weight, by name below the part's."""
    if part.layout is None:
        return {"weight": (part.out_features, part.in_features)}
    biases = ("bias", "cur_c.bias")
    return {key: shape for key, shape in part.layout.tensor_shapes.items() if key not in biases}


def multiply(a: torch.Tensor, b: torch.Tensor, into: torch.Tensor) -> None:
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
