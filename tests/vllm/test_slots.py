import pytest
import torch
from linears import BLOCK, WIDTH, Example, built, load, refused
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear

GATE_UP = ("gate_up_proj", WIDTH, [24, 24])


def gate_and_up() -> dict[str, Example]:
    return {"gate_proj": Example("cur", 24, 0), "up_proj": Example("id", 24, 1)}


KEYS = [(name, key) for name, example in gate_and_up().items() for key in example.tensors]
WEIGHTS = [(name, key) for name, key in KEYS if key.endswith("weight")]


def test_nothing_of_loading_is_left() -> None:
    examples = gate_and_up()
    name, *sizes = GATE_UP
    with built(MergedColumnParallelLinear, name, examples, *sizes) as layer:
        load(layer, examples)
        outside = [name for name, _ in layer.named_parameters() if not name.startswith("products.")]
        assert outside == []


@pytest.mark.parametrize(("part", "key"), KEYS)
def test_missing_tensors_are_named(part: str, key: str) -> None:
    examples = gate_and_up()
    name, *sizes = GATE_UP
    with (
        built(MergedColumnParallelLinear, name, examples, *sizes) as layer,
        refused(f"{BLOCK}.{part}.{key} is missing from the checkpoint"),
    ):
        load(layer, examples, skip=f"{part}.{key}")


@pytest.mark.parametrize(("part", "key"), WEIGHTS)
def test_wrong_shapes_are_named(part: str, key: str) -> None:
    examples = gate_and_up()
    examples[part].tensors[key] = examples[part].tensors[key][1:]
    name, *sizes = GATE_UP
    with (
        built(MergedColumnParallelLinear, name, examples, *sizes) as layer,
        refused(f"{BLOCK}.{part}.{key} has shape"),
    ):
        load(layer, examples)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("part", "key"), WEIGHTS)
def test_numbers_that_are_not_finite_are_named(part: str, key: str, kept: bool) -> None:
    examples = gate_and_up()
    examples[part].tensors[key][0, 0] = float("nan")
    name, *sizes = GATE_UP
    with (
        built(MergedColumnParallelLinear, name, examples, *sizes, keep_factors=kept) as layer,
        refused(f"{BLOCK}.{part}.{key} holds numbers that are not finite"),
    ):
        load(layer, examples)


def test_a_tensor_of_a_dense_part_is_refused() -> None:
    examples = {"gate_proj": Example("cur", 24, 0), "up_proj": Example("dense", 24, 1)}
    name, *sizes = GATE_UP
    with built(MergedColumnParallelLinear, name, examples, *sizes) as layer:
        slot = dict(layer.named_parameters())["cur_c.weight"]
        with refused("for shard 1"):
            slot.weight_loader(slot, torch.zeros(24, 3), 1)


def test_a_checkpoint_that_was_not_read_is_no_damaged_one() -> None:
    examples = {"o_proj": Example("id", 40, 2)}
    with (
        built(ReplicatedLinear, "o_proj", examples, WIDTH, 40) as layer,
        refused("--load-format dummy"),
    ):
        layer.quant_method.process_weights_after_loading(layer)
