"""How vLLM runs a Linear that has factored parts: q, k and v each dense or in a form of its own.

Below the Linear that vLLM's model class makes stand ordinary vLLM Linears: see
:mod:`~cur_modifier.vllm.stages`. Their outputs are put in order for the whole layer at once: see
:mod:`~cur_modifier.vllm.order`.

Where the factors of a small layer save fewer bytes than could be read in the time that their
additional products take, they are multiplied out as they are loaded, and the layer is served as the
dense one that it was: as fast, and as large in memory. Which layers those are is known from their
shapes, so no Linears are made for their factors, and vLLM's own loaders split the product over the
ranks.

Tensor parallelism. A column-parallel Linear splits the last factor (C or T) by outputs and repeats
the first (R or S), since every rank needs all of ``z``. A row-parallel Linear splits the first
factor by inputs; the others act on partial sums, and the reduction that vLLM does anyway adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from cur_modifier.forms.schema import ModuleSpec, SchemaError
from cur_modifier.vllm.cost import save_too_little
from cur_modifier.vllm.forms import Served, served
from cur_modifier.vllm.order import in_order, pairs_of, runs_of, side_by_side
from cur_modifier.vllm.parts import Part, Schemes, by_skeleton, split
from cur_modifier.vllm.slots import DAMAGED, Slots, check_finite
from cur_modifier.vllm.stages import make_products, stacks

__all__ = ["DenseWeight", "FactoredLinearMethod"]


class FactoredLinearMethod(LinearMethodBase):
    """The linear method of one vLLM Linear with at least one factored part.

    Args:
        specs: of the parts by checkpoint name, in the order of their outputs; None for a dense one.
        inner: how factors and dense parts are quantized; None where nothing is.
        check_claimed: called once the weights are loaded. It raises where the model has no Linear
            for a factored module.
        keep_factors: do not multiply them out, even where that is faster.
    """

    def __init__(
        self,
        specs: Mapping[str, ModuleSpec | None],
        inner: QuantizationConfig | None,
        check_claimed: Callable[[], None],
        *,
        keep_factors: bool = False,
    ) -> None:
        self.specs = specs
        self.inner = inner
        self.check_claimed = check_claimed
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
        parts = split(layer, self.specs, input_size)
        outputs = sum(part.width for part in parts)
        if outputs != sum(output_partition_sizes):
            raise SchemaError(
                f"{parts[0].name}: vLLM gives this rank {sum(output_partition_sizes)} outputs of a "
                f"{type(layer).__name__}, and this plugin expected {outputs}. It does not know "
                "how that layer is split. Upgrade it: pip install -U cur-modifier"
            )
        self.parts = parts
        self.dtype = params_dtype
        self.slots = Slots(layer)
        for part in parts:
            self.slots.add_bias(part)
        schemes = Schemes(self.inner, layer)
        found = [served(together, schemes) for together in by_skeleton(parts)]
        sizes = (outputs, input_size_per_partition, params_dtype.itemsize)
        if (
            not self.keep_factors
            and schemes.are_plain(parts)
            and save_too_little(stacks(found, schemes), *sizes)
        ):
            self.dense = DenseWeight(
                layer,
                found,
                self.slots,
                input_size_per_partition=input_size_per_partition,
                output_partition_sizes=output_partition_sizes,
                input_size=input_size,
                output_size=output_size,
                params_dtype=params_dtype,
                **extra_weight_attrs,
            )
            return
        layer.products = nn.ModuleList(make_products(found, schemes, params_dtype))
        layer.register_buffer("output_order", None, persistent=False)
        layer.register_buffer("output_pairs", None, persistent=False)
        for product in layer.products:
            product.declare(self.slots)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take the slots away, make CUR compact, and note the order of the outputs.

        vLLM calls this before it prepares the kernels of the Linears below.

        Raises:
            SchemaError: a tensor that never came, or a factored module that no Linear stands for.
        """
        self.check_claimed()
        self.slots.close()
        if self.dense is not None:
            self.dense.finish(layer)
            return
        for product in layer.products:
            product.prepare()
        order = self._order(layer)
        self.runs = runs_of(order)
        if self.runs is None:
            device = next(layer.parameters()).device
            entries = sum(product.entries for product in layer.products)
            pairs = pairs_of(order, entries, self.dtype)
            layer.output_order = order.to(device)
            layer.output_pairs = None if pairs is None else pairs.to(device)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.dense is not None:
            return self.dense.method.apply(layer, x, bias)
        pieces = [piece for product in layer.products for piece in product(x)]
        if self.runs is None:
            y = in_order(pieces, layer.output_order, layer.output_pairs)
        else:
            y = side_by_side(pieces, self.runs)
        return y if bias is None else y + bias

    def _order(self, layer: Any) -> torch.Tensor:
        """Which entry of all that the products give each output is."""
        orders: dict[Part, torch.Tensor] = {}
        start = 0
        for product in layer.products:
            orders |= dict(product.output_orders(start))
            start += product.entries
        return torch.cat([orders[part] for part in self.parts])


class DenseWeight:
    """The weight of a layer, multiplied out of its parts' factors as they arrive.

    Args:
        layer: the Linear that vLLM's model class made.
        factors: of its parts.
        slots: which get a slot for every tensor of the parts.
        arguments: of ``create_weights``, after the layer.
    """

    def __init__(
        self, layer: Any, factors: Sequence[Served], slots: Slots, **arguments: Any
    ) -> None:
        self.method = UnquantizedLinearMethod()
        self.method.create_weights(layer, **arguments)
        # Until it is whole the name is a slot's: dense parts are loaded under it, too.
        self.weight = layer._parameters.pop("weight")
        for each in factors:
            found: dict[Part, dict[str, torch.Tensor]] = {part: {} for part in each.parts}
            for part in each.parts:
                for key, shape in each.tensors(part).items():
                    take = partial(self._take, each, found, part, key)
                    dtype = torch.int32 if len(shape) == 1 else self.weight.dtype
                    slots.add(part, key, take, dtype)

    def _take(
        self,
        factors: Served,
        found: dict[Part, dict[str, torch.Tensor]],
        part: Part,
        key: str,
        tensor: torch.Tensor,
    ) -> None:
        """Keep a tensor; with the last one of those that share a skeleton, load their weights."""
        shape = factors.tensors(part)[key]
        if tuple(tensor.shape) != shape:
            raise SchemaError(
                f"{part.name}.{key} has shape {tuple(tensor.shape)}, which does not fit "
                f"config.json (expected {shape}). {DAMAGED}"
            )
        check_finite(part, key, tensor)
        factors.check(part, key, tensor)
        found[part][key] = tensor.to(self.weight.device)
        if any(found[each].keys() != factors.tensors(each).keys() for each in found):
            return
        for each, weight in factors.weights(found, self.weight):
            shard = () if each.shard_id is None else (each.shard_id,)
            self.weight.weight_loader(self.weight, weight, *shard)
        found.clear()

    def finish(self, layer: Any) -> None:
        """Give the layer its weight, and let vLLM choose the kernel."""
        layer.register_parameter("weight", self.weight)
        del self.weight  # of which vLLM packs a copy and drops this
        self.method.process_weights_after_loading(layer)
