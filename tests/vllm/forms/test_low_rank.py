import pytest
import torch
from linears import (
    GROUP,
    Example,
    built,
    compressed_tensors,
    hand_over,
    load,
    relative_error,
    rounded_inputs,
)
from vllm.model_executor.layers.linear import RowParallelLinear


def test_a_pair_is_served_in_its_compact_form() -> None:
    """Two products, of r (m + n - r) numbers."""
    example = Example("low_rank", 24, 1)
    rank = example.spec.rank
    with built(RowParallelLinear, "o_proj", {"o_proj": example}, 32, 24) as layer:
        hand_over(layer, {"o_proj": example})
        layer.quant_method.process_weights_after_loading(layer)
        assert sum(p.numel() for p in layer.parameters()) == rank * (24 + 32 - rank)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_quantized_factors_are_served_as_they_are(scheme: str) -> None:
    example = Example("low_rank", 64, 2, width=64, rank=GROUP)
    b, a = example.quantize("lr_b", scheme), example.quantize("lr_a", scheme)
    example.product = a @ b
    layers = built(
        RowParallelLinear,
        "o_proj",
        {"o_proj": example},
        *(64, 64),
        section=compressed_tensors({"o_proj": scheme}),
        params_dtype=torch.bfloat16,
    )
    with layers as layer:
        load(layer, {"o_proj": example})
        [[last]] = layer.products[0].second
        assert last.output_size == 64
        x = rounded_inputs(64)
        error = relative_error(layer(x.bfloat16()).float(), example(x))
        assert error < (0.03 if scheme == "W8A8" else 0.01)
