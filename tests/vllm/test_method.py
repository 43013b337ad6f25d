"""The whole method: every mix of forms in every kind of Linear computes its parts' products."""

import gc
import itertools
import weakref

import pytest
import torch
from linears import (
    FACTORED,
    FORMS,
    FUSED,
    HEAD,
    QKV,
    QKV_SIZES,
    WIDTH,
    Example,
    built,
    compare,
    inputs,
    linears_below,
    load,
    one_of_each_form,
    outputs_of,
    pretend,
    relative_error,
    sharing,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("forms", [*itertools.product(FORMS, repeat=3)], ids="-".join)
def test_every_mix_of_query_key_value(forms: tuple[str, ...], bias: bool) -> None:
    examples = {
        name: Example(form, out, seed, bias=bias)
        for seed, ((name, out), form) in enumerate(zip(QKV.items(), forms, strict=True))
    }
    with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
        if forms == ("dense",) * 3:
            assert isinstance(layer.quant_method, UnquantizedLinearMethod)
            return
        load(layer, examples)
        compare(layer, examples)


@pytest.mark.parametrize("forms", [*itertools.product(FORMS, repeat=2)][1:], ids="-".join)
def test_every_mix_of_gate_and_up(forms: tuple[str, ...]) -> None:
    examples = {
        name: Example(form, 24, seed, bias=True)
        for seed, (name, form) in enumerate(zip(FUSED["gate_up_proj"], forms, strict=True))
    }
    with built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24]) as layer:
        load(layer, examples)
        compare(layer, examples)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear, ReplicatedLinear])
@pytest.mark.parametrize("form", FACTORED)
def test_modules_on_their_own(form: str, kind: type) -> None:
    examples = {"o_proj": Example(form, 40, 2, bias=True)}
    with built(kind, "o_proj", examples, WIDTH, 40) as layer:
        load(layer, examples)
        compare(layer, examples)


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [
        ("qkv_proj", QKVParallelLinear, QKV_SIZES),
        ("gate_up_proj", MergedColumnParallelLinear, (WIDTH, [32, 32])),
    ],
)
@pytest.mark.parametrize("form", FACTORED)
def test_fused_in_the_checkpoint(form: str, name: str, kind: type, sizes: tuple[object]) -> None:
    examples = {name: Example(form, 64, 1, bias=True)}
    with built(kind, name, examples, *sizes) as layer:
        load(layer, examples)
        compare(layer, examples)


def test_compiled_without_a_graph_break() -> None:
    examples = one_of_each_form()
    with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
        load(layer, examples)
        x = torch.randn(5, WIDTH)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("shared", [False, True])
def test_factors_that_save_too_little_are_multiplied_out(shared: bool, rank: int) -> None:
    examples = sharing(QKV, "k_proj", 12, bias=True) if shared else one_of_each_form()
    layers = built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES, keep_factors=False)
    with pretend(rank, 2), layers as layer:
        load(layer, examples)
    assert not linears_below(layer)
    x = inputs()
    wanted = outputs_of(examples, x, rank, 2)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("form", FACTORED)
def test_multiplied_out_and_split_by_inputs(form: str, rank: int) -> None:
    examples = {"o_proj": Example(form, 40, 2)}
    layers = built(
        RowParallelLinear,
        "o_proj",
        examples,
        *(WIDTH, 40),
        keep_factors=False,
        reduce_results=False,
    )
    with pretend(rank, 2), layers as layer:
        load(layer, examples)
    half = torch.zeros(5, WIDTH)
    mine = slice(rank * WIDTH // 2, (rank + 1) * WIDTH // 2)
    half[:, mine] = inputs(WIDTH // 2)
    got = layer(half[:, mine])
    torch.testing.assert_close(got, examples["o_proj"](half), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("form", FACTORED)
def test_factors_that_are_kept_and_split_by_inputs(form: str, rank: int) -> None:
    """Each rank's outputs are a summand of the layer's."""
    examples = {"o_proj": Example(form, 40, 2)}
    layers = built(RowParallelLinear, "o_proj", examples, *(WIDTH, 40), reduce_results=False)
    with pretend(rank, 2), layers as layer:
        load(layer, examples)
    half = torch.zeros(5, WIDTH)
    mine = slice(rank * WIDTH // 2, (rank + 1) * WIDTH // 2)
    half[:, mine] = inputs(WIDTH // 2)
    got = layer(half[:, mine])
    torch.testing.assert_close(got, examples["o_proj"](half), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "rank"), [("id", 256), ("cur", 256), ("id", 900)])
def test_factors_that_save_more_than_a_product_costs_are_kept(form: str, rank: int) -> None:
    width = 1024
    examples = {"o_proj": Example(form, width, 2, width=width, rank=rank)}
    layers = built(ReplicatedLinear, "o_proj", examples, width, width, keep_factors=False)
    with layers as layer:
        load(layer, examples)
    assert bool(linears_below(layer)) == (rank == 256)


@pytest.mark.parametrize("form", FACTORED)
def test_what_is_multiplied_out_is_rounded_once(form: str) -> None:
    example = Example(form, 96, 2, width=64, rank=24)
    factors = {k: t.bfloat16() for k, t in example.tensors.items() if k.endswith("weight")}
    example.tensors |= factors
    chains = {"cur": ("cur_c", "cur_u", "cur_r"), "low_rank": ("lr_a", "lr_b")}
    if form in chains:
        exact = torch.linalg.multi_dot([factors[f"{n}.weight"].float() for n in chains[form]])
    else:
        s, t = (factors[f"id_{name}.weight"].float() for name in "st")
        exact = torch.cat([s, t @ s])[example.tensors["order"]]
    layers = built(
        ReplicatedLinear,
        "o_proj",
        {"o_proj": example},
        *(64, 96),
        keep_factors=False,
        params_dtype=torch.bfloat16,
    )
    with layers as layer:
        load(layer, {"o_proj": example})
    assert not linears_below(layer)
    served = layer(torch.eye(64).bfloat16()).float().T
    # A number alone is rounded by up to 0.0039, by 0.0017 at large.
    assert relative_error(served, exact) < 0.002


@pytest.mark.parametrize("kept", [True, False])
def test_a_layer_whose_model_is_gone_is_freed(kept: bool) -> None:
    examples = one_of_each_form()
    layers = built(QKVParallelLinear, "qkv_proj", examples, WIDTH, HEAD, 4, 2, keep_factors=kept)
    with layers as layer:
        record_metadata_for_reloading(layer)
        load(layer, examples)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
