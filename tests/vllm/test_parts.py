from linears import BLOCK, WIDTH, Example, built, pretend, refused, sharing
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from cur_modifier.vllm.parts import Schemes, by_skeleton, split


def test_wrong_sizes_in_config_are_named() -> None:
    examples = {"o_proj": Example("cur", 40, 2)}
    message = f"{BLOCK}.o_proj is 40x32, but the model that it describes builds it as 48x32"
    with refused(message), built(RowParallelLinear, "o_proj", examples, WIDTH, 48):
        pass


def test_key_value_heads_are_split_and_then_repeated() -> None:
    specs = dict.fromkeys(("q", "k", "v"))
    for rank in range(4):
        with pretend(rank, 4):
            layer = QKVParallelLinear(WIDTH, 8, 4, 2)
        query, key, value = split(layer, specs, WIDTH)
        assert query.outputs == ((8 * rank, 8 * rank + 8),)
        half = rank // 2  # two heads on four ranks
        assert key.outputs == value.outputs == ((8 * half, 8 * half + 8),)
        assert (key.tp_rank, key.tp_size) == (half, 2)


def test_a_module_that_is_fused_in_the_checkpoint_has_a_range_of_each_shard() -> None:
    with pretend(1, 2):
        layer = MergedColumnParallelLinear(WIDTH, [24, 40])
    [part] = split(layer, {"gate_up_proj": None}, WIDTH)
    assert part.shard_id is None
    assert part.out_features == 64
    assert part.outputs == ((12, 24), (24 + 20, 64))
    assert part.width == 32


def test_a_row_parallel_linear_has_all_outputs_on_every_rank() -> None:
    with pretend(1, 2):
        layer = RowParallelLinear(WIDTH, 24)
    [part] = split(layer, {"o_proj": None}, WIDTH)
    assert part.outputs == ((0, 24),)
    assert part.width == 24


def test_parts_that_cannot_be_told_apart_are_refused() -> None:
    layer = MergedColumnParallelLinear(WIDTH, [24, 24])
    with refused("a, b, c run as one MergedColumnParallelLinear with 2 parts"):
        split(layer, dict.fromkeys("abc"), WIDTH)


def test_parts_with_one_skeleton_are_together() -> None:
    examples = sharing({"k_proj": 16, "v_proj": 16}, "v_proj", 12) | {
        "q_proj": Example("id", 32, 0)
    }
    specs = {f"{BLOCK}.{name}": examples[name].spec for name in ("q_proj", "k_proj", "v_proj")}
    layer = QKVParallelLinear(WIDTH, 8, 4, 2)
    parts = split(layer, specs, WIDTH)
    assert by_skeleton(parts) == [parts[:1], parts[1:]]


def test_what_is_not_quantized_is_alike_and_plain() -> None:
    layer = MergedColumnParallelLinear(WIDTH, [24, 24])
    parts = split(layer, {"gate": Example("cur", 24, 0).spec, "up": None}, WIDTH)
    schemes = Schemes(None, layer)
    assert schemes.are_plain(parts)
    assert schemes.alike(parts, lambda part: part.name) == [parts]
