"""What every stage records: its run, what lies beside the checkpoint, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure

pytest.importorskip("llmcompressor")

from loguru import logger

from cur_modifier.modifiers.cur.modifier import CURModifier
from cur_modifier.modifiers.journal import Journal
from cur_modifier.modifiers.report import Refinement, parameter_count

Make = Callable[..., Journal]


@pytest.fixture
def make(model: Any, recipe: Callable[..., Any]) -> Make:
    """A journal that writes no run; its page is made all the same."""

    def made(*, draws: bool = False) -> Journal:
        recipe(CURModifier(form="id", mlflow=False))
        journal = Journal(model, enabled=False, kind="kind")
        journal.draws = draws
        return journal

    return made


def close(journal: Journal, model: Any, **changes: Any) -> None:
    given = {"table": "a table", "metrics": {"ratio": 0.5}, "rows": [{"name": "m"}], "figures": {}}
    journal.close(model, **given | changes)


def drawn(title: str) -> Figure:
    figure = Figure()
    figure.subplots().set_title(title)
    return figure


def test_a_stage_starts_with_its_recipe_and_its_sizes(make: Make, model: Any) -> None:
    journal = make()
    assert not journal.complete and not journal.draws
    assert journal.parameters_before == parameter_count(model)
    [stage] = yaml.safe_load(journal.files["recipe_as_given.yaml"]).values()
    assert stage == {"default_modifiers": {"CURModifier": {"form": "id", "mlflow": False}}}
    journal.fail("no more of it")


def test_the_page_has_the_name_of_kind_and_model_and_all_that_is_logged(
    make: Make, model: Any
) -> None:
    journal = make(draws=True)
    figures = {"one.png": lambda: drawn("one"), "two.png": lambda: drawn("two")}
    rows = [{"name": "up_proj", "kept": 3}, {"name": "down_proj", "kept": 4}]
    close(journal, model, table="head and lines", rows=rows, figures=figures)
    page = journal.files["report.html"]
    for part in ("kind-LlamaForCausalLM", "head and lines", "down_proj", "peak_rss_bytes"):
        assert part in page
    assert page.count("<img") == 2 and "refinement" not in page


def test_sizes_are_those_before_and_after(make: Make, model: Any, tracker: Any) -> None:
    journal = make()
    journal._tracker = tracker
    tracker.html = str
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight[:3]
    close(journal, model)
    [(metrics, step)] = tracker.metrics
    assert step is None and metrics["ratio"] == 0.5
    assert metrics["bytes_model_before"] - metrics["bytes_model_after"] == 4 * 21 * 16
    assert tracker.ended == [None]


def test_a_refinement_is_drawn_at_the_end(make: Make, model: Any) -> None:
    journal = make(draws=True)
    journal.refined("model.layers.0", 0, Refinement(before=0.5, after=0.25, train=[0.5, 0.3]))
    close(journal, model)
    assert "refinement" in journal.files["report.html"]


def test_nothing_is_drawn_where_nothing_is_logged(make: Make, model: Any) -> None:
    journal = make()
    close(journal, model, figures={"one.png": lambda: pytest.fail("drawn")})
    assert "<img" not in journal.files["report.html"]


def test_a_figure_that_cannot_be_drawn_costs_a_warning(
    make: Make, model: Any, logged: list[str]
) -> None:
    journal = make(draws=True)
    figures = {"bad.png": lambda: 1 / 0, "good.png": lambda: drawn("good")}
    close(journal, model, figures=figures)
    assert journal.files["report.html"].count("<img") == 1
    assert any("bad.png could not be drawn and is left out" in m for m in logged)


def test_losses_of_later_stages_are_listened_to_until_the_stage_fails(
    make: Make, tracker: Any
) -> None:
    journal = make()
    journal._tracker = tracker
    assert journal.tracker is tracker
    logger.info("Quantizing 1 module(s): ['layer.up']")
    logger.info("error 0.75")
    journal.fail("interrupted")
    logger.info("Quantizing 1 module(s): ['layer.down']")
    logger.info("error 0.5")
    assert journal.losses.by_module == {"layer.up": 0.75}
    assert tracker.ended == ["interrupted"]
