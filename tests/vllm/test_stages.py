import pytest
import torch
from linears import (
    QKV_SIZES,
    WIDTH,
    Example,
    built,
    compare,
    compressed_tensors,
    load,
    one_of_each_form,
    relative_error,
    rounded_inputs,
)
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)


def test_all_first_factors_are_one_product() -> None:
    examples = one_of_each_form()
    with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
        load(layer, examples)
        [product] = layer.products
        assert (product.first.input_size, product.first.output_size) == (WIDTH, 3 + 4 + 16)
        compare(layer, examples)


def test_small_second_factors_are_one_block_matrix() -> None:
    examples = {name: Example("id", 24, seed) for seed, name in enumerate(("gate_proj", "up_proj"))}
    with built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24]) as layer:
        load(layer, examples)
        assert len(layer.products[0].second) == 1
        compare(layer, examples)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "W4A16_ASYM"])
def test_quantized_first_factors_are_stacked(scheme: str) -> None:
    x = rounded_inputs(64)
    outs = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    examples = {n: Example("id", m, 0, width=64, rank=32) for n, m in outs.items()}
    for example in examples.values():
        s, t = example.quantize("id_s", scheme), example.quantize("id_t", scheme)
        example.product = torch.cat([s, t @ s])[example.tensors["order"].long()]
    layers = built(
        QKVParallelLinear,
        "qkv_proj",
        examples,
        *(64, 32, 4, 2),
        section=compressed_tensors(dict.fromkeys(outs, scheme)),
        params_dtype=torch.bfloat16,
    )
    with layers as layer:
        load(layer, examples)
        assert len(layer.products) == 1
        assert not isinstance(layer.products[0].first.quant_method, UnquantizedLinearMethod)
        wanted = torch.cat([example(x) for example in examples.values()], -1)
        error = relative_error(layer(x.bfloat16()).float(), wanted)
        assert error < (0.03 if scheme == "W8A8" else 0.01)


def test_orders_are_on_the_cpu_wherever_the_model_is_made() -> None:
    examples = {"gate_proj": Example("cur", 24, 0), "up_proj": Example("dense", 24, 1)}
    layers = built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24])
    with torch.device("meta"), layers as layer:
        for product in layer.products:
            for _, order in product.output_orders(0):
                assert order.device.type == "cpu"
