"""Linears get the sizes that a checkpoint gives their parts, in place of those of the config."""

import itertools
from typing import Any

import pytest
import torch
from linears import (
    BLOCK,
    FORMS,
    FUSED,
    GROUP,
    HEAD,
    QKV_SIZES,
    WIDTH,
    Example,
    built,
    compare,
    inputs,
    linears_below,
    load,
    pretend,
    refused,
    relative_error,
    rounded_inputs,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from cur_modifier.vllm.resize import check_attention

TOLD, LEFT = 40, 24  # neurons by the config, and those that are left
PARTS = FUSED["gate_up_proj"]


def gate_up(
    forms: tuple[str, ...] = ("dense", "dense"), lefts: tuple[int, ...] = (LEFT, LEFT), **kw: Any
) -> dict[str, Example]:
    return {
        name: Example(form, left, seed, **kw)
        for seed, (name, form, left) in enumerate(zip(PARTS, forms, lefts, strict=True))
    }


def merged(examples: dict[str, Example], **kwargs: Any) -> Any:
    return built(
        MergedColumnParallelLinear,
        "gate_up_proj",
        examples,
        *(WIDTH, [TOLD, TOLD]),
        resized=True,
        **kwargs,
    )


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("forms", [*itertools.product(FORMS, repeat=2)], ids="-".join)
def test_every_mix_of_gate_and_up(forms: tuple[str, ...], kept: bool) -> None:
    examples = gate_up(forms, bias=True)
    with merged(examples, keep_factors=kept) as layer:
        load(layer, examples)
        compare(layer, examples)
    assert layer.output_sizes == [LEFT, LEFT] and layer.output_size == 2 * LEFT
    dense = forms == ("dense", "dense")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod) == dense
    assert bool(linears_below(layer)) == (kept and not dense)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("forms", [("dense", "dense"), ("dense", "id"), ("cur", "id")])
def test_outputs_are_split_over_ranks(forms: tuple[str, ...], rank: int) -> None:
    examples = gate_up(forms)
    with pretend(rank, 2), merged(examples) as layer:
        load(layer, examples)
    x = inputs()
    wanted = [example(x).chunk(2, -1)[rank] for example in examples.values()]
    torch.testing.assert_close(layer(x), torch.cat(wanted, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear, ReplicatedLinear])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("left", "read"), [(LEFT, WIDTH), (WIDTH, LEFT)])
def test_modules_on_their_own(form: str, kind: type, left: int, read: int) -> None:
    examples = {"fc": Example(form, left, 2, width=read, bias=True)}
    told = (WIDTH, TOLD) if read == WIDTH else (TOLD, WIDTH)
    with built(kind, "fc", examples, *told, resized=True) as layer:
        load(layer, examples)
        compare(layer, examples, read)
    assert (layer.input_size, layer.output_size) == (read, left)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_split_over_ranks(form: str, rank: int) -> None:
    examples = {"down_proj": Example(form, WIDTH, 2, width=LEFT)}
    layers = built(
        RowParallelLinear,
        "down_proj",
        examples,
        *(TOLD, WIDTH),
        resized=True,
        reduce_results=False,
    )
    with pretend(rank, 2), layers as layer:
        load(layer, examples)
    half = torch.zeros(5, LEFT)
    mine = slice(rank * LEFT // 2, (rank + 1) * LEFT // 2)
    half[:, mine] = inputs(LEFT // 2)
    wanted = examples["down_proj"](half)
    torch.testing.assert_close(layer(half[:, mine]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_fused_in_the_checkpoint(form: str) -> None:
    examples = {"gate_up_proj": Example(form, 2 * LEFT, 1, bias=True)}
    with merged(examples) as layer:
        load(layer, examples)
        compare(layer, examples)
    assert layer.output_sizes == [LEFT, LEFT]


def in_four_bits(example: Example) -> None:
    """Store a dense example in 4 bits."""
    example.tensors["dense.weight"] = example.tensors.pop("weight")
    example.product = example.quantize("dense", "W4A16")
    example.tensors = {k.removeprefix("dense."): t for k, t in example.tensors.items()}


FOUR_BITS = {
    "config_groups": {
        "four": {
            "targets": [r"re:.*(gate|up|down)_proj$"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
            },
            "input_activations": None,
            "format": "pack-quantized",
        }
    },
    "format": "pack-quantized",
    "ignore": [],
}


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("forms", [("dense", "dense"), ("dense", "id")])
def test_dense_parts_in_four_bits(forms: tuple[str, ...], rank: int) -> None:
    examples = gate_up(forms, (64, 64), width=64, rank=32)
    for form, example in zip(forms, examples.values(), strict=True):
        if form == "dense":
            in_four_bits(example)
    layers = built(
        MergedColumnParallelLinear,
        "gate_up_proj",
        examples,
        *(64, [96, 96]),
        resized=True,
        section=FOUR_BITS,
        params_dtype=torch.bfloat16,
    )
    with pretend(rank, 2), layers as layer:
        load(layer, examples)
    x = rounded_inputs(64)
    wanted = torch.cat([example(x).chunk(2, -1)[rank] for example in examples.values()], -1)
    assert relative_error(layer(x.bfloat16()).float(), wanted) < 0.01


@pytest.mark.parametrize("rank", range(2))
def test_a_consumer_in_four_bits(rank: int) -> None:
    examples = {"down_proj": Example("dense", 64, 1, width=2 * GROUP)}
    in_four_bits(examples["down_proj"])
    layers = built(
        RowParallelLinear,
        "down_proj",
        examples,
        *(4 * GROUP, 64),
        resized=True,
        section=FOUR_BITS,
        params_dtype=torch.bfloat16,
        reduce_results=False,
    )
    with pretend(rank, 2), layers as layer:
        load(layer, examples)
    half = torch.zeros(5, 2 * GROUP)
    mine = slice(rank * GROUP, (rank + 1) * GROUP)
    half[:, mine] = rounded_inputs(GROUP)
    wanted = examples["down_proj"](half)
    assert relative_error(layer(half[:, mine].bfloat16()).float(), wanted) < 0.01


def test_parts_of_unequal_sizes_are_refused() -> None:
    message = f"{BLOCK}.gate_proj and {BLOCK}.up_proj have [24, 16] outputs"
    with refused(message), merged(gate_up(lefts=(24, 16))):
        pass


def test_a_part_that_reads_something_else_is_refused() -> None:
    examples = gate_up()
    examples["up_proj"] = Example("dense", LEFT, 1, width=WIDTH - 8)
    with refused("read one tensor, but config.json gives them [24, 32] inputs"), merged(examples):
        pass


def test_fused_parts_of_unknown_sizes_are_refused() -> None:
    message = "fc have 24 outputs. vLLM runs them as 2 parts of [40, 8] outputs by config.json"
    examples = {"fc": Example("dense", LEFT, 1)}
    layers = built(MergedColumnParallelLinear, "fc", examples, *(WIDTH, [40, 8]), resized=True)
    with refused(message), layers:
        pass


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_what_does_not_divide_by_the_ranks_is_refused(kind: type) -> None:
    examples = {"fc": Example("dense", 25, 1, width=25)}
    layers = built(kind, "fc", examples, *(WIDTH, WIDTH), resized=True)
    with refused(f"{BLOCK}.fc: 25 does not divide by 2 ranks"), pretend(0, 2), layers:
        pass


def test_heads_are_refused() -> None:
    examples = {name: Example("dense", out, 1) for name, out in zip("qkv", (24, 8, 8), strict=True)}
    examples = {f"{name}_proj": example for name, example in examples.items()}
    message = f"{BLOCK}.q_proj: its heads are not those of config.json"
    layers = built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES, resized=True)
    with refused(message), layers:
        pass


def test_a_resized_linear_next_to_the_attention_is_refused() -> None:
    attention = f"{BLOCK}.self_attn"
    resized = {f"{attention}.o_proj": HEAD, f"{BLOCK}.mlp.down_proj": LEFT}
    with refused(f"{attention}.o_proj: its heads are not those of config.json"):
        check_attention(f"{attention}.attn", resized)
    check_attention(f"{BLOCK}.other.attn", resized)
