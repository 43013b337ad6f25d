"""The stage through its events: units removed, or its run failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llmcompressor")

from .stages import stage


def test_all_is_done_when_later_stages_look(
    model: Any, state: Any, recipe: Callable[..., Any], tmp_path: Path, logged: list[str]
) -> None:
    before = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    done = recipe(stage())
    assert done.on_initialize(state)
    after = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    assert after / before <= 0.8 and not done.requires_calibration_data
    done.on_finalize(state)
    done.on_finalize(state)  # upstream may ask twice
    assert any("over the budget" in message for message in logged)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    width = model.model.layers[0].mlp.down_proj.in_features
    assert config["intermediate_size"] == width < 24
    assert "quantization_config" not in config
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"recipe_as_given.yaml", "report.html"} <= names and "cur_code" not in names


def test_weights_alone_take_no_data(model: Any, state: Any, recipe: Callable[..., Any]) -> None:
    state.data.calib = None
    fields: dict[str, Any] = {"fit": "weight", "selection": "norm", "correct": "none"}
    done = recipe(stage(**fields, budget={"ratio": 0.8, "by": "uniform"}))
    assert done.on_initialize(state)
    assert model.config.intermediate_size == model.model.layers[0].mlp.down_proj.in_features < 24
    done.on_finalize(state)


def test_a_refused_stage_changes_nothing(
    model: Any, state: Any, recipe: Callable[..., Any]
) -> None:
    refused = recipe(stage(budget={"ratio": 0.1}))
    with pytest.raises(ValueError, match="Raise the budget"):
        refused.on_initialize(state)
    assert model.model.layers[0].mlp.down_proj.in_features == 24
    assert not hasattr(model.save_pretrained, "brought")
    refused.on_finalize(state)


def test_a_failure_on_the_way_closes_the_run(
    model: Any, state: Any, recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = recipe(stage())
    batches = state.data.calib
    state.data.calib = [{"input_ids": batch["input_ids"] + 10_000} for batch in batches]
    with pytest.raises((IndexError, ValueError)):
        broken.on_initialize(state)
    assert broken._journal is None
