"""What a removal tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

pytest.importorskip("llmcompressor")

from loguru import logger

from cur_modifier.modifiers.prune.journal import PruningJournal
from cur_modifier.modifiers.prune.modifier import IDPruningModifier
from cur_modifier.modifiers.prune.report import UnitRecord
from cur_modifier.structure.removal import Units, remove

LAYER = "model.layers.0"
NAME = f"{LAYER}.mlp.down_proj"


@pytest.fixture
def journal(model: Any, recipe: Callable[..., Any]) -> PruningJournal:
    recipe(IDPruningModifier(multiple_of=8, mlflow=False))
    return PruningJournal(model, enabled=False)


@pytest.fixture
def record() -> UnitRecord:
    return UnitRecord(
        name=NAME,
        layer=0,
        kind="neurons",
        before=24,
        after=16,
        cost=48,
        relative_error=0.125,
        seconds=0.5,
    )


def without_neurons(model: Any) -> None:
    """What the record says was done."""
    import torch

    every = torch.arange(24)[:, None]
    producers = {f"{LAYER}.mlp.{name}_proj": every for name in ("gate", "up")}
    remove(model, Units(LAYER, "neurons", producers, NAME, every), torch.arange(16))


def test_the_recipe_lies_beside_the_checkpoint(journal: PruningJournal) -> None:
    [stage] = yaml.safe_load(journal.files["recipe_as_given.yaml"]).values()
    [group] = stage.values()
    assert group == {"IDPruningModifier": {"multiple_of": 8, "mlflow": False}}


def test_what_was_removed_is_told(
    journal: PruningJournal, record: UnitRecord, tracker: Any, logged: list[str]
) -> None:
    journal._tracker = tracker
    journal.removed(record)
    assert journal.records == {NAME: record}
    assert tracker.metrics == [({"relative_error": 0.125, "module_seconds": 0.5}, 1)]
    assert f"{NAME}: 16 of 24 neurons kept, relative error 0.1250, 0.50 s" in logged


def test_the_end_has_totals_and_a_table(
    journal: PruningJournal, record: UnitRecord, model: Any, tracker: Any, logged: list[str]
) -> None:
    journal._tracker = tracker
    tracker.html = str
    journal.removed(record)
    before = journal.parameters_before
    without_neurons(model)
    journal.finish(model, "parameters", before, before - 8 * 48)
    [_, (metrics, step)] = tracker.metrics
    assert step is None and metrics["neurons_after"] == 16
    assert metrics["ratio_budget"] == metrics["ratio_model"] == (before - 8 * 48) / before
    assert metrics["bytes_model_after"] == metrics["bytes_model_before"] - 8 * 48 * 4
    assert tracker.ended == [None]
    assert any(
        m.startswith("IDPruningModifier\n") and "parameters after ÷ before" in m for m in logged
    )


def test_the_page_shows_what_every_layer_keeps(
    journal: PruningJournal, record: UnitRecord, model: Any
) -> None:
    journal.draws = True
    journal.removed(record)
    journal.finish(model, "MACs", 5000, 4616)
    page = journal.files["report.html"]
    assert "prune-LlamaForCausalLM" in page and NAME in page
    assert "MACs after ÷ before" in page and page.count("<img") == 1


def test_a_stage_that_removed_nothing_has_nothing_to_show(
    journal: PruningJournal, model: Any
) -> None:
    journal.draws = True
    journal.finish(model, "parameters", 5000, 5000)
    assert "<img" not in journal.files["report.html"]


def test_the_end_is_the_end_of_listening(journal: PruningJournal, model: Any) -> None:
    journal.finish(model, "parameters", 5000, 5000)
    logger.info(f"Quantizing 1 module(s): ['{NAME}']")
    logger.info("error 0.75")
    assert journal.losses.by_module == {}


def test_convolutions_are_shown_one_after_another(
    journal: PruningJournal, small_resnet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cur_modifier.modifiers.prune import journal as module

    drawn: list[Any] = []
    monkeypatch.setattr(module, "kept_units", drawn.append)
    model = small_resnet(0)
    names = [f"resnet.encoder.stages.0.layers.{k}.layer.1.convolution" for k in (1, 0)]
    for name in names:
        journal.records[name] = UnitRecord(name, 0, "channels", 8, 4, 100)
    journal.draws = True
    journal.finish(model, "MACs", 5000, 4000)
    assert drawn == [[("channels", 1, 0.5), ("channels", 0, 0.5)]]
