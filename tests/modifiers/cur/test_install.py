"""Empty factored modules take the places of Linears, and answer with them until fitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.forms.base import factored_layers
from cur_modifier.forms.sizes import FORMS
from cur_modifier.modifiers.cur.install import install, onload, quantization_noise

from .stages import DOWN, GATE, OUT, UP, K, Q, V, planned, prepared, stage

IDS = torch.arange(6)[None]


def test_four_bits_bring_about_one_percent_of_noise() -> None:
    assert quantization_noise(None) == 0
    assert quantization_noise(4) == pytest.approx(0.0081, rel=0.01)
    assert quantization_noise(8) == pytest.approx(quantization_noise(4) / 256)


@pytest.mark.parametrize("form", FORMS)
def test_the_model_computes_the_same_until_the_fit(
    model: Any, batches: Any, recipe: Callable[..., Any], form: str
) -> None:
    model.eval()
    with torch.no_grad():
        before = model(IDS).logits
        installed, fitting = prepared(stage(form=form), model, batches, recipe)
        assert torch.equal(model(IDS).logits, before)
    layers = factored_layers(model)
    assert layers.keys() == {Q, K, V, OUT, GATE, UP, DOWN} == fitting.journal.records.keys()
    assert all(not layer.training and layer.dense is not None for layer in layers.values())
    for each in installed:
        assert each.first is each.last is layers[each.candidate.name]
        record = fitting.journal.records[each.candidate.name]
        assert record.rank == 4 and record.form == form
        assert record.parameters_after == each.first.stored_parameters
        assert record.shared_skeleton is record.direct_outputs is None


def test_those_that_share_a_skeleton_are_installed_as_one(
    model: Any, recipe: Callable[..., Any]
) -> None:
    settings = stage(fit="weight", share_skeleton=True)
    installed, fitting = prepared(settings, model, None, recipe)
    qkv = installed[0]
    assert list(qkv.containers) == [Q, K, V]
    assert (qkv.first, qkv.last) == (qkv.containers[Q], qkv.containers[V])
    records = fitting.journal.records
    assert [records[n].shared_skeleton for n in (Q, K, V)] == [None, Q, Q]
    assert sum(records[n].direct_outputs for n in (Q, K, V)) == 4


def test_what_stays_dense_is_said_and_recorded(
    model: Any, recipe: Callable[..., Any], logged: list[str]
) -> None:
    settings = stage(targets=["re:.*q_proj$"], rank={"energy": 1.0}, fit="weight", multiple_of=1)
    installed, fitting = prepared(settings, model, None, recipe)
    record = fitting.journal.records[Q]
    assert installed == [] and factored_layers(model) == {}
    assert record.rank is None and record.parameters_after is None
    assert any("q_proj stays dense: the rank that holds energy 1.0" in m for m in logged)


def test_noise_is_expected_where_a_later_stage_quantizes(
    model: Any, batches: Any, recipe: Callable[..., Any]
) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    later = QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=["lm_head"])
    for form, noise in (("id", quantization_noise(8)), ("cur", 0.0)):
        settings = stage(form=form, targets=["re:.*q_proj$"])
        plan = planned(settings, model, batches, recipe)
        recipe(settings, later)
        _, records = install(model, plan, settings)
        assert records[Q].expected_noise == noise
        model.set_submodule(Q, factored_layers(model)[Q].dense)


def test_without_an_accelerator_nothing_is_moved(model: Any, recipe: Callable[..., Any]) -> None:
    installed, _ = prepared(stage(fit="weight"), model, None, recipe)
    onload(installed)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
