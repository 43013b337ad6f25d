"""From settings, model and data to counts: and every reason that a stage can't be carried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

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
    assert plan.multiples == {"neurons": 4, "heads": 1}
