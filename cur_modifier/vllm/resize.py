"""Linears of vLLM whose sizes are not those of ``config.json``'s own fields.

The constructor of a Linear sets its sizes, chooses its quantization method, and makes parameters of
those sizes. :func:`resize` runs in the second step and corrects them. From then on vLLM's own
methods, loaders and kernels work with the true sizes, and so does our method for factored parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from cur_modifier.forms.schema import SchemaError

__all__ = ["check_attention", "resize"]

_UNIFORM = (
    "vLLM's attention has the same heads in every layer. Compress the model again with "
    "`shapes: uniform` in the stage that removes heads."
)


def resize(layer: Any, sizes: Mapping[str, tuple[int, int] | None]) -> None:
    """Give a Linear that is being made the sizes that its parts have in the checkpoint.

    Args:
        sizes: ``(out_features, in_features)`` of the parts by checkpoint name, in the order of
            their outputs; None for one that is as vLLM's model builds it.

    Raises:
        SchemaError: sizes that the layer can't have: heads of attention, parts that do not fit each
            other, or a dimension that does not divide by the ranks.
    """
    names = [name for name, size in sizes.items() if size is not None]
    if not names:
        return
    if isinstance(layer, QKVParallelLinear):
        raise SchemaError(f"{names[0]}: its heads are not those of config.json, and {_UNIFORM}")
    built = list(getattr(layer, "output_sizes", [layer.output_size]))
    outputs = _outputs(layer, sizes, built)
    found = {layer.input_size if size is None else size[1] for size in sizes.values()}
    if len(found) > 1:
        raise SchemaError(
            f"{' and '.join(sizes)} read one tensor, but config.json gives them {sorted(found)} "
            "inputs. It was edited, or belongs to another checkpoint."
        )
    [inputs] = found
    if isinstance(layer, RowParallelLinear):
        layer.input_size_per_partition = _share(layer, names[0], inputs)
        layer.output_size_per_partition = sum(outputs)
        layer.output_partition_sizes = outputs
    elif isinstance(layer, ColumnParallelLinear):
        layer.input_size_per_partition = inputs
        layer.output_partition_sizes = [_share(layer, names[0], out) for out in outputs]
        layer.output_size_per_partition = sum(layer.output_partition_sizes)
    else:  # every rank has all of it
        layer.output_partition_sizes = outputs
    layer.input_size, layer.output_size = inputs, sum(outputs)
    if hasattr(layer, "output_sizes"):
        layer.output_sizes = outputs


def check_attention(prefix: str, resized: Mapping[str, Any]) -> None:
    """Refuse other heads than config.json's where vLLM runs attention.

    Args:
        prefix: the name of vLLM's attention itself; q, k, v and o have the same parent.
        resized: whatever is resized, by name.

    Raises:
        SchemaError: a resized Linear next to the attention.
    """
    parent = prefix.rpartition(".")[0]
    for name in resized:
        if name.rpartition(".")[0] == parent:
            raise SchemaError(f"{name}: its heads are not those of config.json, and {_UNIFORM}")


def _outputs(
    layer: Any, sizes: Mapping[str, tuple[int, int] | None], built: list[int]
) -> list[int]:
    """Outputs of each part over all ranks, in the order of ``built``, which are as vLLM's model
    builds them."""
    alike = len(set(built)) == 1
    if len(sizes) == len(built):
        outputs = [
            out if size is None else size[0]
            for out, size in zip(built, sizes.values(), strict=True)
        ]
    else:  # the checkpoint has fused them already
        total = sum(size[0] for size in sizes.values() if size is not None)
        outputs = [total // len(built)] * len(built)
        if len(sizes) > 1 or not alike or sum(outputs) != total:
            raise SchemaError(
                f"{' and '.join(sizes)} have {total} outputs. vLLM runs them as {len(built)} parts "
                f"of {built} outputs by config.json, and this plugin does not know how many each "
                "part has now. Compress the model again without them."
            )
    if alike and len(set(outputs)) > 1:  # vLLM's model splits them in equal parts
        raise SchemaError(
            f"{' and '.join(sizes)} have {outputs} outputs, and vLLM runs them as one "
            f"{type(layer).__name__} of equal parts. Compress the model again with as many in each."
        )
    return outputs


def _share(layer: Any, name: str, dimension: int) -> int:
    """This rank's part of a dimension that is split."""
    if dimension % layer.tp_size:
        raise SchemaError(
            f"{name}: {dimension} does not divide by {layer.tp_size} ranks. Use a "
            f"--tensor-parallel-size that divides {dimension}, or compress the model again with a "
            f"`multiple_of` that {layer.tp_size} divides."
        )
    return int(dimension // layer.tp_size)
