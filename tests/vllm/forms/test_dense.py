import pytest
import torch
from linears import QKV, QKV_SIZES, Example, built, inputs, load, outputs_of, pretend
from vllm.model_executor.layers.linear import QKVParallelLinear


@pytest.mark.parametrize("form", ["cur", "id", "low_rank"])
@pytest.mark.parametrize("rank", range(2))
def test_a_dense_part_is_split_by_outputs(rank: int, form: str) -> None:
    """It is a product of its own then: the other parts' first factors are not split."""
    examples = {
        name: Example("dense" if name == "q_proj" else form, out, seed)
        for seed, (name, out) in enumerate(QKV.items())
    }
    with pretend(rank, 2):
        with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
            load(layer, examples)
        assert len(layer.products) == 2
        assert layer.products[0].first.output_size_per_partition == QKV["q_proj"] // 2
        x = inputs()
        wanted = outputs_of(examples, x, rank, 2)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
