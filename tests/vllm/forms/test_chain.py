import pytest
import torch
from linears import WIDTH, Example, built, compare, hand_over, load
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear

from cur_modifier.forms.sizes import FORMS
from cur_modifier.vllm.forms.chain import Chain
from cur_modifier.vllm.forms.cur import CUR
from cur_modifier.vllm.forms.low_rank import LowRank

LAST = {"cur": "cur_c.weight", "low_rank": "lr_a.weight"}


@pytest.mark.parametrize(("served", "form"), [(CUR, "cur"), (LowRank, "low_rank")])
def test_a_chain_has_the_factors_of_its_form(served: type[Chain], form: str) -> None:
    spec = Example(form, 24, 0).spec
    assert spec is not None
    assert list(served.factors) == list(FORMS[form].factors(spec))


@pytest.mark.parametrize("form", LAST)
@pytest.mark.parametrize("rank", [3, 23, 24])
def test_it_computes_the_product(form: str, rank: int) -> None:
    """Compact where the rank is below the outputs, and as it is stored where it is not."""
    example = Example(form, 24, 1, rank=rank, bias=True)
    with built(ReplicatedLinear, "o_proj", {"o_proj": example}, WIDTH, 24) as layer:
        hand_over(layer, {"o_proj": example})
        layer.quant_method.process_weights_after_loading(layer)
        kept = sum(p.numel() for p in layer.products.parameters())
        stored = sum(t.numel() for k, t in example.tensors.items() if k.endswith("weight"))
        assert kept == (rank * (24 + WIDTH - rank) if rank < 24 else stored)
        for module in list(layer.products.modules()):
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)
        compare(layer, {"o_proj": example})


@pytest.mark.parametrize("form", LAST)
def test_factors_without_safe_rows_are_served_all_the_same(form: str) -> None:
    rank = 8
    example = Example(form, 24, 0, rank=rank)
    # Elimination with partial pivoting at its worst: T would hold entries of 2^7.
    columns = torch.eye(rank) - torch.ones(rank, rank).tril(-1)
    columns = torch.cat([columns, torch.ones(16, rank)])
    last = example.tensors[LAST[form]]
    inner = torch.linalg.lstsq(last, example.product).solution
    example.tensors[LAST[form]] = columns
    example.product = columns @ inner
    with built(RowParallelLinear, "o_proj", {"o_proj": example}, WIDTH, 24) as layer:
        load(layer, {"o_proj": example})
        compare(layer, {"o_proj": example})
        assert layer.products[0].entries == rank + 24
