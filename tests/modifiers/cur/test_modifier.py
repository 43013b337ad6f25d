"""The stage through its events: fitted, or failed with its run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.quantization import QuantizationModifier

from cur_modifier.forms.base import factored_layers
from cur_modifier.forms.sizes import FORMS

from .stages import DOWN, GATE, UP, Q, stage


@pytest.mark.parametrize("form", FORMS)
def test_a_stage_ends_with_fitted_factors_and_no_hooks(
    model: Any, state: Any, calibrated: Callable[..., Any], form: str, logged: list[str]
) -> None:
    done = calibrated(stage(form=form))
    layers = factored_layers(model)
    assert len(layers) == 7 and all(layer.dense is None for layer in layers.values())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert done.journal is not None and done.journal.complete
    done.on_finalize(state)
    assert done.journal is None
    assert any("7 modules factored" in message for message in logged)
    done.on_finalize(state)  # upstream may ask twice


def test_neurons_stand_in_order_where_row_ids_agree(
    model: Any, calibrated: Callable[..., Any], logged: list[str]
) -> None:
    calibrated(stage())
    for name in (GATE, UP):
        order = factored_layers(model)[name].order
        assert torch.equal(order, torch.arange(24, dtype=torch.int32))
    assert any("the neurons of 1 MLPs stand in the order" in m for m in logged)


def test_a_layerwise_stage_needs_no_pipeline(model: Any, calibrated: Callable[..., Any]) -> None:
    done = calibrated(stage(anchor=0.25))
    assert not done.requires_calibration_data
    assert all(layer.dense is None for layer in factored_layers(model).values())


def test_the_saved_model_is_a_factored_checkpoint(
    model: Any, state: Any, calibrated: Callable[..., Any], tmp_path: Any
) -> None:
    done = calibrated(stage())
    done.on_finalize(state)
    model.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "recipe_as_given.yaml", "report.html"} <= names


def test_stages_that_share_a_pass_are_refused(state: Any, recipe: Callable[..., Any]) -> None:
    settings = recipe(stage(), QuantizationModifier(scheme="W8A8", targets=["Linear"]))
    settings.on_initialize(state)
    with pytest.raises(ValueError, match=r"shares its calibration pass with \['Quantization"):
        settings.on_calibration_start(state, None)
    assert settings.journal is None  # its run has failed


def test_modules_that_were_never_run_are_named(state: Any, recipe: Callable[..., Any]) -> None:
    settings = recipe(stage(targets=["re:.*q_proj$"]))
    settings.on_initialize(state)
    settings.on_calibration_start(state, None)
    with pytest.raises(ValueError, match=rf"the calibration never ran \['{Q}'\]"):
        settings.on_calibration_end(state, None)
    assert settings.journal is None


def test_a_stage_that_is_interrupted_says_so(
    state: Any, recipe: Callable[..., Any], tracker: Any
) -> None:
    settings = recipe(stage())
    settings.on_initialize(state)
    settings.journal._tracker = tracker
    settings.on_finalize(state)
    assert tracker.ended == ["the compression was interrupted before every module was factored"]


def test_what_cannot_be_is_refused_before_anything_is_changed(
    model: Any, state: Any, recipe: Callable[..., Any]
) -> None:
    settings = recipe(stage(targets=["nothing"]))
    with pytest.raises(ValueError, match="target 'nothing' matches no Linear"):
        settings.on_initialize(state)
    assert factored_layers(model) == {} and settings.journal is None


def test_a_stage_without_a_run_has_nothing_to_finalize(state: Any) -> None:
    assert stage().on_finalize(state)


def test_errors_of_later_layers_leave_earlier_ones_fitted(
    model: Any, state: Any, recipe: Callable[..., Any]
) -> None:
    settings = recipe(stage(targets=["re:.*(q|down)_proj$"]))
    settings.on_initialize(state)
    settings.on_calibration_start(state, None)
    with torch.no_grad():
        for batch in state.data.calib:
            model(**batch)
    settings.on_sequential_epoch_end(state, None, [model.get_submodule(Q)])
    assert model.get_submodule(Q).dense is None and model.get_submodule(DOWN).dense is not None
