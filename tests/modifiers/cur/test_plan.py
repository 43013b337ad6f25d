"""One plan, or every reason that there is none, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.linalg import damped
from cur_modifier.modifiers.cur.plan import check

from .stages import DOWN, GATE, LAYER, OUT, UP, K, Q, V, planned, stage

Recipe = Callable[..., Any]


def test_a_fixed_plan_needs_no_data(model: Any, recipe: Recipe) -> None:
    settings = stage(fit="weight")
    plan = planned(settings, model, None, recipe)
    assert {c.name: c.rank for c in plan.candidates} == dict.fromkeys(
        (Q, K, V, OUT, GATE, UP, DOWN), 4
    )
    assert plan.chosen == [1] and plan.costs is None and plan.sensitivity is None
    assert plan.settings is settings and len(plan.layers) == 3


def test_neurons_of_row_ids_without_selection_are_planned(model: Any, recipe: Recipe) -> None:
    [mlp] = planned(stage(fit="weight"), model, None, recipe).neurons
    assert (mlp.layer, mlp.producers, mlp.consumer) == (LAYER, (GATE, UP), DOWN)
    for fields in ({"selection": "qdeim", "scores": "weight"}, {"form": "low_rank"}):
        assert planned(stage(fit="weight", **fields), model, None, recipe).neurons == []


def test_layers_that_turn_least_are_chosen(model: Any, batches: Any, recipe: Recipe) -> None:
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # layer 1 does nothing
        torch.nn.init.zeros_(model.model.layers[1].get_submodule(name).weight)
    plan = planned(stage(layers={"count": 1}), model, batches, recipe)
    assert plan.chosen == [1] and len(plan.costs) == 3
    assert plan.costs[1] == min(plan.costs)


def test_energy_gives_ranks_by_the_spectrum_of_each(
    model: Any, batches: Any, recipe: Recipe
) -> None:
    up = model.get_submodule(UP)
    with torch.no_grad():
        up.weight.copy_(torch.randn(24, 2) @ torch.randn(2, 16))
    settings = stage(targets=["re:.*up_proj$"], rank={"energy": 0.999}, multiple_of=1)
    [candidate] = planned(settings, model, batches, recipe).candidates
    assert candidate.rank in (1, 2)


def test_a_budget_spends_what_the_loss_minds(
    model: Any, batches: Any, recipe: Recipe, tmp_path: Any
) -> None:
    settings = stage(
        rank={"ratio": 0.8, "budget": "sensitivity", "least": 0.1},
        multiple_of=1,
        sensitivity={"samples": 2, "cache": str(tmp_path / "measured.safetensors")},
    )
    plan = planned(settings, model, batches, recipe)
    assert plan.sensitivity is not None and len({c.rank for c in plan.candidates}) > 1
    metric = plan.metric(Q)
    torch.testing.assert_close(metric, damped(plan.sensitivity.outputs[Q], 0.1))
    assert plan.outputs_metric(plan.candidates[0]) is None  # the fit is by the inputs alone
    assert (tmp_path / "measured.safetensors").is_file()


def test_shared_skeletons_have_their_shares_planned(model: Any, recipe: Recipe) -> None:
    plan = planned(stage(fit="weight", share_skeleton=True), model, None, recipe)
    names = [c.name for c in plan.candidates]
    assert names == [f"{Q}+k_proj+v_proj", OUT, f"{GATE}+up_proj", DOWN]
    assert [sum(c.direct_outputs) for c in plan.candidates if c.shared] == [4, 4]


def test_a_skeleton_that_nobody_shares_costs_a_warning(
    model: Any, recipe: Recipe, logged: list[str]
) -> None:
    settings = recipe(stage(targets=["re:.*o_proj$"], fit="weight", share_skeleton=True))
    check(settings, model, None)
    assert any("share_skeleton changes nothing" in message for message in logged)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": {"select": [7]}}, r"layers\.select holds \[7\]; the model has layers 0 to 2"),
        ({"layers": {"count": 2}}, r"layers\.count is 2, but the model has 1 layers"),
        ({"rank": {"fixed": 99}}, r"q_proj: rank 99 is above 15"),
        ({"targets": ["nothing"]}, r"target 'nothing' matches no Linear"),
        ({"fit": "gram"}, r"no calibration data, but fit 'gram' need it"),
        (
            {"rank": {"ratio": 0.11, "budget": "sensitivity", "least": 0.1}},
            r"ratio 0\.11 allows",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_refused_without_data(
    model: Any, recipe: Recipe, fields: dict[str, Any], message: str
) -> None:
    settings = recipe(stage(**{"fit": "weight"} | fields))
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=message):
        check(settings, model, None)
    assert list(model.named_modules()) == before


def test_weights_that_are_not_finite_are_named(model: Any, recipe: Recipe) -> None:
    model.get_submodule(K).weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"k_proj\.weight contains NaN .* in 1 entries"):
        check(recipe(stage(fit="weight")), model, None)


def test_too_few_windows_to_refine_are_refused(model: Any, batches: Any, recipe: Recipe) -> None:
    settings = recipe(stage(refine={"validation_share": 0.5}))
    one = [{"input_ids": batches[0]["input_ids"][:1]}]
    with pytest.raises(ValueError, match=r"1 calibration samples can't be split"):
        check(settings, model, one)
