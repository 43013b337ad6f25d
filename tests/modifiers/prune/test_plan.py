"""From settings, model and data to counts: and every reason that a stage can't be carried out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")


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


def test_heads_are_split_as_they_are(model: Any, batches: Any, recipe: Callable[..., Any]) -> None:
    plan = check(recipe(stage(units=["neurons", "heads"])), model, batches)
    assert [each.kind for each in plan.units[:2]] == ["heads", "neurons"]
    assert plan.multiples == {"neurons": 4, "heads": 1, "channels": 4}


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"ratio": 0.6}, {"parameters": 0.7}])
def test_channels_keep_the_budget(
    small_resnet: Any, images: Any, recipe: Callable[..., Any], budget: dict[str, float]
) -> None:
    settings = recipe(
        stage(units=["channels"], shapes="free", multiple_of=1, budget={**budget, "least": 0.1})
    )
    model = small_resnet(0)
    plan = make_plan(check(settings, model, images), model, images)
    share = plan.costs.left(plan.units, plan.counts) / plan.costs.total
    assert settings.budget.share - 0.1 < share <= settings.budget.share
    assert plan.positions["classifier.1"] == 1 and len(set(plan.counts.values())) > 1


def test_an_error_counts_once_a_position(
    small_resnet: Any,
    images: Any,
    recipe: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A loss is one of an image: what a layer adds to it grows with its positions."""
    from cur_modifier.modifiers.prune import plan as module

    monkeypatch.setenv("CUR_MODIFIER_CACHE", str(tmp_path))
    settings = recipe(stage(units=["channels"], shapes="free", multiple_of=1))
    model = small_resnet(0)
    draft = check(settings, model, images)
    monkeypatch.setattr(
        module, "growth_by_count", lambda W, G, H, units: torch.ones(len(units) + 1)
    )
    plan = make_plan(draft, model, images)
    assert plan.sensitivity is not None
    for units in plan.units:
        curve = plan.sensitivity.spectra[units.consumer]
        assert set(curve.tolist()) == {float(plan.positions[units.consumer])}
