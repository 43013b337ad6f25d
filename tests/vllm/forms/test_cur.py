import torch
from linears import WIDTH, Example, built, compare, load
from vllm.model_executor.layers.linear import RowParallelLinear


def test_cur_is_served_in_its_compact_form() -> None:
    """Two products, of r (m + n - r) numbers."""
    example = Example("cur", 24, 1)
    with built(RowParallelLinear, "o_proj", {"o_proj": example}, WIDTH, 24) as layer:
        weights = dict(layer.named_parameters())
        for key, tensor in example.tensors.items():
            weights[key].weight_loader(weights[key], tensor)
        layer.quant_method.process_weights_after_loading(layer)
        kept = sum(parameter.numel() for parameter in layer.parameters())
        assert kept == 4 * (24 + WIDTH - 4)


def test_columns_that_have_no_safe_rows_are_served_all_the_same() -> None:
    rank = 8
    example = Example("cur", 24, 0, rank=rank)
    # Elimination with partial pivoting at its worst: T would hold entries of 2^7.
    columns = torch.eye(rank) - torch.ones(rank, rank).tril(-1)
    columns = torch.cat([columns, torch.ones(16, rank)])
    example.tensors["cur_c.weight"] = columns
    example.product = columns @ example.tensors["cur_u.weight"] @ example.tensors["cur_r.weight"]
    with built(RowParallelLinear, "o_proj", {"o_proj": example}, WIDTH, 24) as layer:
        load(layer, {"o_proj": example})
        compare(layer, {"o_proj": example})
        assert layer.products[0].entries == rank + 24


def test_a_rank_as_large_as_the_outputs_keeps_three_factors() -> None:
    example = Example("cur", 24, 0, rank=24)
    with built(RowParallelLinear, "o_proj", {"o_proj": example}, WIDTH, 24) as layer:
        load(layer, {"o_proj": example})
        compare(layer, {"o_proj": example})
        [[u, c]] = layer.products[0].second
        assert (u.output_size, c.output_size) == (24, 24)
