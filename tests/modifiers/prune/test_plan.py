"""From settings, model and data to counts: and every reason that a stage can't be carried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

from cur_modifier.modifiers.prune.plan import check, make_plan, put_counts

from .stages import LAYERS, stage


@pytest.mark.parametrize("shapes", ["uniform", "free"])
@pytest.mark.parametrize(
    "budget", [{"ratio": 0.8}, {"macs": 0.8, "sequence_length": 8}, {"parameters": 0.9}]
)
def test_counts_keep_the_budget(
    model: Any, batches: Any, recipe: Callable[..., Any], shapes: str, budget: dict[str, float]
) -> None:
    settings = recipe(stage(shapes=shapes, budget=budget))
    plan = make_plan(check(settings, model, batches), model, batches)
    assert plan.costs.left(plan.units, plan.counts) <= settings.budget.share * plan.costs.total
    assert all(count % 4 == 0 for count in plan.counts.values())
    assert len(plan.counts) == LAYERS and all(g >= 0 for g in plan.growth.values())
    if shapes == "uniform":
        [count] = set(plan.counts.values())
        assert plan.fields == {"intermediate_size": count}
        put_counts(model, plan)
        assert model.config.intermediate_size == count
    else:
        put_counts(model, plan)
        assert not plan.fields and model.config.intermediate_size == 24


def test_nothing_is_measured_that_nothing_asks_for(
    model: Any, batches: Any, recipe: Callable[..., Any]
) -> None:
    settings = recipe(stage(fit="gram", budget={"ratio": 0.8, "by": "uniform"}))
    plan = make_plan(check(settings, model, batches), model, batches)
    assert plan.sensitivity is None and not plan.growth
    assert all(plan.outputs_metric(each) is None for each in plan.units)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": {"ratio": 0.2}}, "budget ratio 0.2 allows .* Raise the budget"),
        ({"multiple_of": 13}, "24 neurons, and multiple_of 13 leaves no choice"),
        ({"targets": ["re:.*nothing"]}, r"targets \['re:.\*nothing'\].*match no consumer"),
        ({"ignore": [r"re:.*layers\.0.*"]}, "in 2 of 3 layers.*Target all layers, or write"),
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


def test_heads_are_split_as_they_are(model: Any, batches: Any, recipe: Callable[..., Any]) -> None:
    plan = check(recipe(stage(units=["neurons", "heads"])), model, batches)
    assert [each.kind for each in plan.units[:2]] == ["heads", "neurons"]
    assert plan.multiples == {"neurons": 4, "heads": 1}
