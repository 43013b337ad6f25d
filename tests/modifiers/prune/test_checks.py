"""Every reason that a removal can't be carried out, with its remedy, before any data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")
import transformers
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

from cur_modifier.modifiers.prune.plan import check

from .stages import stage


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": {"ratio": 0.2}}, "budget ratio 0.2 allows .* Raise the budget"),
        ({"multiple_of": 13}, "24 neurons, and multiple_of 13 leaves no choice"),
        ({"targets": ["re:.*nothing"]}, r"targets \['re:.\*nothing'\].*match no consumer"),
        ({"ignore": [r"re:.*layers\.0.*"]}, "in 2 of 3 layers.*Target all layers, or write"),
        ({"tensor_parallel": 3}, "3 does not divide multiple_of 4.*a multiple of 3, e.g. 3"),
        (
            {"units": ["heads"], "tensor_parallel": 4},
            "2 heads of keys and values, and tensor_parallel 4 leaves no choice",
        ),
        ({"units": ["heads"], "shapes": "free"}, "vLLM keeps one cache.*`served: false`"),
    ],
)
def test_what_cannot_be_is_refused_without_data(
    model: Any, batches: Any, recipe: Callable[..., Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(recipe(stage(**fields)), model, batches)


def test_no_data_is_refused(model: Any, recipe: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"no calibration data.*`dataset=`"):
        check(recipe(stage()), model, None)


def test_a_weight_that_is_not_finite_is_named(
    model: Any, batches: Any, recipe: Callable[..., Any]
) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.up_proj.weight contains NaN or infinity in 1"
    ):
        check(recipe(stage()), model, batches)


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        (
            lambda: GPTQModifier(
                targets=["Linear"],
                config_groups={
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 4, "strategy": "group", "group_size": 8},
                    }
                },
            ),
            "takes 8 inputs of .*down_proj together, and multiple_of is 4.*multiple of 8",
        ),
    ],
)
def test_later_stages_must_be_able_to_split_what_is_left(
    model: Any, batches: Any, recipe: Callable[..., Any], modifier: Any, message: str
) -> None:
    first = recipe(stage(), modifier())
    with pytest.raises(ValueError, match=message):
        check(first, model, batches)
    check(recipe(stage(), QuantizationModifier(scheme="W8A8", targets=["Linear"])), model, batches)


def test_what_each_rank_has_must_divide_into_groups(
    model: Any, batches: Any, recipe: Callable[..., Any]
) -> None:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 4}
    gptq = GPTQModifier(config_groups={"g": {"targets": ["Linear"], "weights": weights}})
    check(recipe(stage(), gptq), model, batches)
    gptq = GPTQModifier(config_groups={"g": {"targets": ["Linear"], "weights": weights}})
    with pytest.raises(ValueError, match=r"multiple_of is 4 for 2 ranks.*to a multiple of 8"):
        check(recipe(stage(tensor_parallel=2), gptq), model, batches)


def test_heads_of_a_config_without_their_size_are_not_for_vllm(
    batches: Any, recipe: Callable[..., Any]
) -> None:
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    heads = {"units": ["heads"], "budget": {"ratio": 0.9}}
    with pytest.raises(ValueError, match=r"Qwen2Config declares none.*`served: false`"):
        check(recipe(stage(**heads)), model, batches)
    assert check(recipe(stage(**heads, served=False)), model, batches).units
    assert check(recipe(stage()), model, batches).units


CHANNELS = {"units": ["channels"], "shapes": "free", "multiple_of": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": {"macs": 0.01}}, "budget macs 0.01 allows .* Raise the budget"),
        ({"multiple_of": 8}, r"layers\.0\.layer\.0\.convolution has 8 channels, and multiple_of 8"),
        ({"targets": ["re:.*nothing"]}, "match no consumer .*convolution"),
        ({"units": ["channels", "neurons"]}, "no neurons of ResNetForImageClassification"),
    ],
)
def test_channels_that_cannot_go_are_refused_before_the_pass(
    small_resnet: Any, images: Any, recipe: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(recipe(stage(**CHANNELS | fields)), small_resnet(0), images)


def test_channels_take_an_image_even_where_weights_alone_choose(
    small_resnet: Any, recipe: Any
) -> None:
    by_weight = {"fit": "weight", "selection": "norm", "correct": "none"}
    fields = CHANNELS | by_weight | {"budget": {"ratio": 0.5, "by": "uniform"}}
    with pytest.raises(ValueError, match=r"channels are looked for in images.*columns \[\]"):
        check(recipe(stage(**fields)), small_resnet(0), None)


def test_why_convolutions_keep_their_channels(
    small_resnet: Any, images: Any, recipe: Any, logged: list[str]
) -> None:
    plan = check(recipe(stage(**CHANNELS)), small_resnet(0), images)
    assert [u.kind for u in plan.units] == ["channels"] * 4
    kept = [m for m in logged if "keeps its channels" in m]
    assert len(kept) == 6 and sum("residual sum" in m for m in kept) == 5


def test_a_model_without_convolutions_has_no_channels(
    small_resnet: Any, recipe: Any, images: Any
) -> None:
    model = small_resnet(0).classifier  # of a pooled image
    model.main_input_name = "pixel_values"
    model.forward = lambda pixel_values: model[1](pixel_values.flatten(1)[:, :16])
    with pytest.raises(ValueError, match=r"no channels of Sequential.*no convolution"):
        check(recipe(stage(**CHANNELS)), model, images)


@pytest.mark.parametrize("empty", [False, True])
def test_channels_take_images(model: Any, recipe: Any, batches: Any, empty: bool) -> None:
    held = r"\[\]" if empty else r"\['input_ids'\]"
    with pytest.raises(
        ValueError, match=f"columns {held}.*DataLoader of batches with pixel_values"
    ):
        check(recipe(stage(**CHANNELS)), model, [] if empty else batches)


def test_grouped_convolutions_are_named(small_resnet: Any, images: Any, recipe: Any) -> None:
    model = small_resnet(0)
    for stage_ in model.resnet.encoder.stages:
        for block in stage_.layers:
            for part in block.layer:
                old = part.convolution
                sides = (old.in_channels, old.out_channels)
                part.convolution = torch.nn.Conv2d(*sides, 3, old.stride, 1, groups=2)
    with pytest.raises(ValueError, match="it has 2 groups, whose channels go together"):
        check(recipe(stage(**CHANNELS)), model, images)
