"""What a stage tells, and that telling never stops the work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("llmcompressor")

from loguru import logger

from cur_modifier.modifiers.cur.journal import FactoringJournal
from cur_modifier.modifiers.cur.modifier import CURModifier
from cur_modifier.modifiers.report import ModuleRecord, Refinement

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def journal(model: Any, recipe: Callable[..., Any], tracker: Any) -> FactoringJournal:
    recipe(CURModifier(form="id", mlflow=False))
    journal = FactoringJournal(model, enabled=False)
    journal._tracker = tracker
    tracker.html = lambda: "<html>"
    journal.records = {
        NAME: ModuleRecord(
            name=NAME,
            layer=0,
            form="id",
            out_features=16,
            in_features=16,
            parameters_before=256,
            rank=4,
            parameters_after=112,
            relative_error=0.125,
            seconds=0.5,
        )
    }
    return journal


def test_the_recipe_lies_beside_the_checkpoint(journal: FactoringJournal) -> None:
    [stage] = yaml.safe_load(journal.files["recipe_as_given.yaml"]).values()
    [group] = stage.values()
    assert group == {"CURModifier": {"form": "id", "mlflow": False}}


def test_costs_are_logged_by_layer(journal: FactoringJournal, tracker: Any) -> None:
    journal.planned("angular", [0.25, math.inf, 0.5], [0])
    assert tracker.metrics == [({"angular_distance": 0.25}, 0), ({"angular_distance": 0.5}, 2)]
    journal.planned("sensitivity", [1.0], [0])
    assert tracker.metrics[-1] == ({"expected_loss_growth_nats": 1.0}, 0)
    journal.planned("all", None, [0])
    assert len(tracker.metrics) == 3


def test_a_fitted_module_is_told(
    journal: FactoringJournal, tracker: Any, logged: list[str]
) -> None:
    journal.fitted(NAME, list(journal.records.values()), torch.eye(16), None)
    assert tracker.metrics == [({"relative_error": 0.125, "module_seconds": 0.5}, 1)]
    assert f"{NAME}: 16x16 as id of rank 4, relative error 0.1250, 0.50 s" in logged
    assert journal._spectra == {}  # nothing is drawn


@pytest.mark.parametrize("kept", [True, False])
def test_a_refined_layer_is_told(
    journal: FactoringJournal, tracker: Any, logged: list[str], kept: bool
) -> None:
    journal.refined("model.layers.3", 3, Refinement(before=0.5, after=0.25, kept=kept))
    losses = {"refine_loss_before": 0.5, "refine_loss_after": 0.25}
    assert tracker.metrics == [(losses, 3)]
    [message] = [m for m in logged if m.startswith("model.layers.3")]
    assert ("not kept" in message) is not kept


def test_the_end_has_totals_and_the_losses_of_later_stages(
    journal: FactoringJournal, tracker: Any, model: Any, logged: list[str]
) -> None:
    logger.info(f"Quantizing 1 module(s): ['{NAME}.id_s']")
    logger.info("error 0.75")
    journal.finish(model)
    assert journal.records[NAME].losses == {"id_s": 0.75}
    [(metrics, step)] = tracker.metrics
    assert step is None and metrics["modules_factored"] == 1
    assert metrics["bytes_model_before"] == metrics["bytes_model_after"] > 0
    assert metrics["peak_rss_bytes"] > 10**7
    assert tracker.ended == [None] and journal.files["report.html"] == "<html>"
    assert any("q_proj" in m and "1 modules factored" in m for m in logged)


def test_a_page_that_cannot_be_made_costs_a_warning(
    journal: FactoringJournal, tracker: Any, model: Any, logged: list[str]
) -> None:
    tracker.html = lambda: 1 / 0
    journal.finish(model)
    assert tracker.ended == [None] and "report.html" not in journal.files
    assert any("report.html could not be drawn and is left out" in m for m in logged)


def test_a_failed_stage_closes_its_run_with_the_error(
    journal: FactoringJournal, tracker: Any
) -> None:
    error = ValueError("rank 9 > 8")
    journal.fail(error)
    assert tracker.ended == [error]
