"""Units of large weights stay, without data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.prune.journal import PruningJournal
from cur_modifier.modifiers.prune.magnitude import remove_by_weight, unit_norms
from cur_modifier.modifiers.prune.plan import check, make_plan
from cur_modifier.modifiers.prune.report import format_table, totals

from .stages import stage

WEIGHT: dict[str, Any] = {
    "fit": "weight",
    "selection": "norm",
    "correct": "none",
    "units": ["neurons", "heads"],
    "budget": {"ratio": 0.6, "by": "uniform"},
}


@pytest.fixture
def removed(
    model: Any, recipe: Callable[..., Any]
) -> Callable[..., tuple[Any, PruningJournal, Any]]:
    def run(**fields: Any) -> tuple[Any, PruningJournal, Any]:
        own = copy.deepcopy(model)
        plan = make_plan(check(recipe(stage(**WEIGHT | fields)), own, None), own, None)
        journal = PruningJournal(own, enabled=False)
        remove_by_weight(own, plan, journal)
        return own, journal, plan

    return run


def test_a_norm_is_that_of_all_weights_of_a_unit(model: Any, recipe: Callable[..., Any]) -> None:
    plan = check(recipe(stage(**WEIGHT)), model, None)
    heads, neurons = plan.units[:2]
    mlp = model.get_submodule(neurons.layer).mlp
    for neuron in (0, 7):
        parts = [mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron]]
        whole = torch.cat([*parts, mlp.down_proj.weight[:, neuron]])
        torch.testing.assert_close(unit_norms(model, neurons)[neuron], whole.double().norm())
    attention = model.get_submodule(heads.layer).self_attn
    every = unit_norms(model, heads).square().sum()
    weights = [getattr(attention, f"{name}_proj").weight for name in "qkvo"]
    torch.testing.assert_close(every, sum(w.double().square().sum() for w in weights))


def test_the_largest_stay_as_they_are(model: Any, removed: Any) -> None:
    pruned, journal, plan = removed()
    assert plan.costs.left(plan.units, plan.counts) <= 0.6 * plan.costs.total
    for units in plan.units:
        count = plan.counts[units.consumer]
        norms = unit_norms(model, units)
        kept = norms.topk(count).indices.sort().values
        features = units.reads[kept].flatten()
        before = model.get_submodule(units.consumer).weight[:, features]
        assert torch.equal(pruned.get_submodule(units.consumer).weight, before)
    records = list(journal.records.values())
    assert all(record.relative_error is None for record in records)
    left = plan.costs.left(plan.units, plan.counts)
    summed = totals(records, (plan.costs.total, left), (100, 60))
    assert "unknown" in format_table(records, summed, "parameters")


def test_random_units_depend_on_the_seed(removed: Any) -> None:
    drawn = [removed(selection="random", seed=seed)[0] for seed in (0, 0, 1)]
    first, again, other = (m.model.layers[0].mlp.down_proj.weight for m in drawn)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_layers_that_lose_nothing_are_reported(model: Any, recipe: Callable[..., Any]) -> None:
    plan = check(recipe(stage(**WEIGHT)), model, None)
    every = {units.consumer: units.count for units in plan.units}
    journal = PruningJournal(model, enabled=False)
    remove_by_weight(model, replace(plan, counts=every), journal)
    assert list(journal.records) == list(every)
    assert all(r.after == r.before and r.seconds is None for r in journal.records.values())
