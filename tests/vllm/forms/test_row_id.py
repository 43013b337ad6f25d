"""Row IDs that share a skeleton, plain and quantized, on one rank and on several."""

import itertools

import pytest
import torch
from linears import (
    BLOCK,
    FORMS,
    GROUPS,
    QKV,
    QKV_SIZES,
    WIDTH,
    built,
    compare,
    grouped,
    inputs,
    linears_below,
    load,
    outputs_of,
    pretend,
    quantized,
    refused,
    relative_error,
    rounded_inputs,
    sharing,
)
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)

GATE_UP = {"gate_proj": 24, "up_proj": 24}
TOLERANCES = {"W4A16": 0.01, "W8A8": 0.03}


@pytest.mark.parametrize(
    ("group", "leader", "form"),
    [(group, leader, form) for group in GROUPS for leader, form in itertools.product(group, FORMS)],
)
def test_every_way_to_share_a_skeleton_in_query_key_value(
    group: tuple[str, ...], leader: str, form: str
) -> None:
    examples = grouped(group, leader, form, bias=True)
    with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
        load(layer, examples)
        compare(layer, examples)
        assert sum(len(product.served) for product in layer.products) == 4 - len(group)


@pytest.mark.parametrize("name", ["qkv_proj", "gate_up_proj"])
def test_one_skeleton_and_one_interpolation(name: str) -> None:
    if name == "qkv_proj":
        examples = grouped(GROUPS[0], "k_proj", "dense")
        layers = built(QKVParallelLinear, name, examples, *QKV_SIZES)
    else:
        examples = sharing(GATE_UP, "gate_proj", 20)
        layers = built(MergedColumnParallelLinear, name, examples, WIDTH, [24, 24])
    with layers as layer:
        load(layer, examples)
        compare(layer, examples)
        total = sum(len(example.product) for example in examples.values())
        assert linears_below(layer) == {
            "products.0.first": (WIDTH, 20),
            "products.0.second.0.0": (20, total - 20),
        }


@pytest.mark.parametrize("leader", GATE_UP)
@pytest.mark.parametrize("gate", [0, 24])
def test_a_skeleton_may_be_one_modules_outputs(gate: int, leader: str) -> None:
    """All of the skeleton is of one module, which may have no T."""
    direct = {"gate_proj": gate, "up_proj": 24 - gate}
    examples = sharing(GATE_UP, leader, 24, direct=direct)
    layers = built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24])
    with layers as layer:
        load(layer, examples)
        compare(layer, examples)


@pytest.mark.parametrize(("rank", "size"), [(r, size) for size in (2, 4) for r in range(size)])
@pytest.mark.parametrize("group", GROUPS)
def test_every_rank_of_a_shared_skeleton(group: tuple[str, ...], rank: int, size: int) -> None:
    """Heads of key and value are split over 2 ranks and repeated on 4."""
    examples = grouped(group, group[-1], "id", rank=12 + size)
    with pretend(rank, size):
        with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
            load(layer, examples)
        x = inputs()
        wanted = outputs_of(examples, x, rank, size)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_shared_skeleton_compiles_without_a_graph_break() -> None:
    examples = grouped(("k_proj", "v_proj"), "k_proj", "cur")
    with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
        load(layer, examples)
        x = torch.randn(5, WIDTH)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("leader", QKV)
@pytest.mark.parametrize("scheme", TOLERANCES)
def test_quantized_interpolations_are_stacked(scheme: str, leader: str) -> None:
    direct = {"q_proj": 7, "k_proj": 14, "v_proj": 11}  # no kernel takes 57, 18 or 21 outputs
    got, wanted, layer = quantized(
        dict.fromkeys(QKV, scheme), direct, rounded_inputs(64), leader=leader
    )
    [[second]] = layer.products[0].second
    assert second.output_size == 96
    assert not isinstance(second.quant_method, UnquantizedLinearMethod)
    assert relative_error(got, wanted) < TOLERANCES[scheme]


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("scheme", TOLERANCES)
def test_quantized_interpolations_of_every_rank(scheme: str, rank: int) -> None:
    # 32, 6 and 16 rows at most, which no kernel takes; so 64, as for a row ID of all three.
    direct = {"q_proj": 0, "k_proj": 26, "v_proj": 6}
    got, wanted, layer = quantized(
        dict.fromkeys(QKV, scheme), direct, rounded_inputs(64), rank=rank, size=2
    )
    assert layer.products[0].second[0][0].output_size == 64
    assert relative_error(got, wanted) < TOLERANCES[scheme]


@pytest.mark.parametrize(
    ("schemes", "sizes"),
    [
        ({"q_proj": "W4A16", "k_proj": "W4A16"}, [64, 32]),
        ({"q_proj": "W8A8", "v_proj": "W4A16"}, [32, 32, 32]),
        ({"k_proj": "W8A8"}, [64, 32]),
    ],
)
def test_interpolations_that_are_quantized_differently(
    schemes: dict[str, str], sizes: list[int]
) -> None:
    direct = {"q_proj": 32, "k_proj": 0, "v_proj": 0}
    got, wanted, layer = quantized(schemes, direct, rounded_inputs(64))
    assert [chain[0].output_size for chain in layer.products[0].second] == sizes
    assert relative_error(got, wanted) < 0.03


def test_zero_points_are_stacked_or_refused() -> None:
    schemes = dict.fromkeys(QKV, "W4A16_ASYM")
    x = rounded_inputs(64)
    got, wanted, _ = quantized(schemes, {"q_proj": 8, "k_proj": 16, "v_proj": 8}, x)
    assert relative_error(got, wanted) < 0.01
    packed = "q_proj.id_t has 57 rows, whose zero points are packed by 8: they can't be stacked"
    with refused(packed):
        quantized(schemes, {"q_proj": 7, "k_proj": 14, "v_proj": 11}, x)


LACKING = [
    (name, key)
    for name in ("k_proj", "v_proj")
    for key in grouped(("k_proj", "v_proj"), "v_proj", "dense")[name].tensors
]


@pytest.mark.parametrize(("name", "key"), LACKING)
def test_what_a_shared_skeleton_lacks_is_named(name: str, key: str) -> None:
    examples = grouped(("k_proj", "v_proj"), "v_proj", "dense")
    with (
        built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer,
        refused(f"{BLOCK}.{name}.{key} is missing from the checkpoint"),
    ):
        load(layer, examples, skip=f"{name}.{key}")


@pytest.mark.parametrize("change", ["less rows", "more rows", "less columns"])
@pytest.mark.parametrize(("name", "key"), [pair for pair in LACKING if pair[1].endswith("weight")])
def test_what_does_not_fit_a_shared_skeleton_is_named(name: str, key: str, change: str) -> None:
    examples = grouped(("k_proj", "v_proj"), "v_proj", "dense")
    tensor = examples[name].tensors[key]
    examples[name].tensors[key] = {
        "less rows": tensor[1:],
        "more rows": torch.cat([tensor, tensor[:1]]),
        "less columns": tensor[:, 1:],
    }[change]
    with (
        built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer,
        refused(f"{BLOCK}.{name}.{key} has shape"),
    ):
        load(layer, examples)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("entry", ["negative", "twice", "too large"])
def test_orders_that_lead_nowhere_are_named(entry: str, kept: bool) -> None:
    examples = grouped(("k_proj", "v_proj"), "v_proj", "dense")
    order = examples["k_proj"].tensors["order"]
    wrong = {"negative": -1, "twice": int(order[0]), "too large": 20 + len(order)}[entry]
    examples["k_proj"].tensors["order"] = torch.cat([order[:-1], torch.tensor([wrong]).int()])
    layers = built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES, keep_factors=kept)
    with layers as layer, refused(f"{BLOCK}.k_proj.order is not each of the"):
        load(layer, examples)
