"""Factors of a candidate: fitted to its moment, loaded, and written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.forms.sizes import FORMS
from cur_modifier.linalg import gram_norm, shrunk
from cur_modifier.modifiers.cur.fitting import SHRINKAGE, named

from .stages import DOWN, GATE, UP, K, Q, V, prepared, stage

Recipe = Callable[..., Any]


def moment(features: int = 16) -> torch.Tensor:
    x = torch.randn(200, features, generator=torch.Generator().manual_seed(3))
    x = x * torch.logspace(0, -2, features)
    return x.T @ x / 200


@pytest.mark.parametrize("form", FORMS)
def test_the_record_says_how_far_the_loaded_factors_are(
    model: Any, batches: Any, recipe: Recipe, form: str
) -> None:
    W = model.get_submodule(Q).weight.detach().clone()
    settings = stage(form=form, targets=["re:.*q_proj$"])
    [each], fitting = prepared(settings, model, batches, recipe)
    G = moment()
    fitting.fit([each], G)
    layer = each.first
    assert layer.dense is None and model.get_submodule(Q) is layer
    record = fitting.journal.records[Q]
    missed = gram_norm(W - layer.dense_weight(), G) / gram_norm(W, G)
    assert record.relative_error == pytest.approx(missed, rel=1e-5)
    entries = [float(f.weight.detach().abs().max()) for f in layer.factors.values()]
    assert record.max_factor_entry == pytest.approx(max(entries))
    assert record.seconds is not None


@pytest.mark.parametrize(("fit", "better"), [("gram", "weight"), ("diag", "weight")])
def test_a_norm_of_the_fit_is_served_best_by_its_own(
    model: Any, batches: Any, recipe: Recipe, fit: str, better: str
) -> None:
    W = model.get_submodule(Q).weight.detach().clone()
    G, errors = moment(), {}
    for norm in (fit, better):
        settings = stage(fit=norm, targets=["re:.*q_proj$"], form="low_rank")
        [each], fitting = prepared(settings, model, batches, recipe)
        dense = each.first.dense
        fitting.fit([each], G)
        metric = G if fit == "gram" else G.diagonal()
        errors[norm] = gram_norm(W - each.first.dense_weight(), metric)
        model.set_submodule(Q, dense)
    assert errors[fit] < errors[better]


def test_producers_of_the_same_neurons_get_one_order(
    model: Any, batches: Any, recipe: Recipe
) -> None:
    settings = stage(targets=["re:.*(gate|up)_proj$"])
    installed, fitting = prepared(settings, model, batches, recipe)
    fitting.fit(installed, moment())
    gate, up = (each.first for each in installed)
    assert torch.equal(gate.order, up.order)


def test_targets_take_the_weight_s_place(model: Any, batches: Any, recipe: Recipe) -> None:
    [each], fitting = prepared(
        stage(targets=["re:.*q_proj$"], rank={"fixed": 15}), model, batches, recipe
    )
    target = torch.randn(16, 15) @ torch.randn(15, 16)
    fitting.fit([each], None, {Q: target.double()})
    torch.testing.assert_close(each.first.dense_weight(), target, rtol=1e-3, atol=1e-3)


def test_parts_of_a_shared_skeleton_are_each_recorded(
    model: Any, batches: Any, recipe: Recipe
) -> None:
    settings = stage(targets=["re:.*(q|k|v)_proj$"], share_skeleton=True)
    [each], fitting = prepared(settings, model, batches, recipe)
    fitting.fit([each], moment())
    for name in (Q, K, V):
        assert 0 < fitting.journal.records[name].relative_error < 1
    assert each.containers[K].leader is each.containers[Q]


def test_few_tokens_are_warned_of_and_shrunk(
    model: Any, batches: Any, recipe: Recipe, logged: list[str]
) -> None:
    _, fitting = prepared(stage(), model, batches, recipe)
    G = moment()
    few = fitting.regularized([GATE, UP], G, 8)
    torch.testing.assert_close(few, shrunk(G, SHRINKAGE * 16 / 8))
    assert [m for m in logged if "8 tokens calibrate 16 inputs" in m and m.startswith(GATE)]
    assert fitting.regularized([DOWN], G, 16) is G
    assert [fitting.journal.records[n].tokens for n in (GATE, UP, DOWN)] == [8, 8, 16]


def test_a_stage_that_anchors_always_shrinks(model: Any, batches: Any, recipe: Recipe) -> None:
    _, fitting = prepared(stage(anchor=0.5), model, batches, recipe)
    G = moment()
    torch.testing.assert_close(fitting.regularized([Q], G, 160), shrunk(G, SHRINKAGE * 16 / 160))


def test_what_goes_wrong_is_said_of_the_module(model: Any, batches: Any, recipe: Recipe) -> None:
    [each], fitting = prepared(stage(targets=["re:.*q_proj$"]), model, batches, recipe)
    with pytest.raises(ValueError, match=rf"^{Q}: the Gram matrix contains NaN"):
        fitting.fit([each], torch.full((16, 16), torch.nan))
    with pytest.raises(KeyError), named("module"):
        raise KeyError
