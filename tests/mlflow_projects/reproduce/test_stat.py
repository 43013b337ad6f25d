"""What is said of the rows: verdicts follow the figures."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from mlflow_projects.reproduce.encoders import Pruned
from mlflow_projects.reproduce.stat import BUDGETS, EXPERIMENT, METHODS, OURS, PLAIN

TASKS = ("sst2", "mrpc")


def rows(**lost: float) -> list[dict[str, Any]]:
    """Scores by how many points each method loses at 0.5; others lose 10, and all more at 0.2."""
    found = []
    for task in TASKS:
        for method, macs in [("dense", 1.0), *((m, b) for m in METHODS for b in (0.5, 0.2))]:
            points = 0.0 if method == "dense" else lost.get(method, 10.0) * (1 + (macs == 0.2))
            found.append(
                {
                    "task": task,
                    "method": method,
                    "MACs": macs,
                    "metric": "accuracy",
                    "score": 0.9 - points / 100,
                    "stderr": 0.01,
                    "examples": 400,
                }
            )
    return found


def said(**lost: float) -> str:
    return "\n".join(EXPERIMENT.findings(rows(**lost)))


def test_every_task_has_a_dense_row_and_all_methods_at_all_budgets() -> None:
    options = argparse.Namespace(tasks=list(TASKS), budgets=[])
    cases = EXPERIMENT.cases(options)
    labels = [tuple(case.labels.values()) for case in cases]
    assert len(set(labels)) == len(cases) == 2 * (1 + len(METHODS) * len(BUDGETS))
    assert all((c.stage is None) != (c.module is None) for c in cases if c.method != "dense")
    options.budgets = [0.4]
    assert {case.macs for case in EXPERIMENT.cases(options)} == {1.0, 0.4}


def test_stages_are_settings_of_ours() -> None:
    modifier = pytest.importorskip("cur_modifier.modifiers.prune.modifier").IDPruningModifier
    for how in METHODS.values():
        if callable(how):
            settings = modifier(**how(0.2))
            assert settings.budget.measure == "macs" and settings.budget.floor <= 0.1
    magnitude: Any = METHODS["magnitude"]
    assert not modifier(**magnitude(0.5)).needs_data


def test_the_claim_is_judged() -> None:
    holds = said(**{OURS: 0.4, PLAIN: 3.0})
    assert f"**holds** on all 2 tasks for {OURS}. Points lost: 0.4 on sst2, 0.4 on mrpc." in holds
    assert f"does **not** hold on 2 of 2 tasks for {PLAIN}. Points lost: 3.0 on sst2" in holds
    assert "Within 1.5 points of dense at 0.5: ours on 2 of 2 tasks." in holds
    assert "does **not** hold on 2 of 2 tasks for ours" in said(**{OURS: 1.2})


def test_ours_is_set_against_the_best_of_the_others() -> None:
    ahead = said(**{OURS: 1.0, PLAIN: 3.0})
    assert f"At 0.5 ours is ahead of the best of the others by +2.0 on sst2 ({PLAIN})" in ahead
    assert f"+4.0 on mrpc ({PLAIN}): everywhere, by 3 points or more." in ahead  # at 0.2
    behind = said(**{OURS: 5.0, PLAIN: 3.0})
    assert f"-2.0 on sst2 ({PLAIN}), -2.0 on mrpc ({PLAIN}): not everywhere." in behind


def test_the_table_has_a_column_for_every_budget() -> None:
    table = EXPERIMENT.table(rows(**{OURS: 1.0}))
    assert list(table[0]) == ["task", "method", "1", "0.5", "0.2"]
    assert table[0] == {
        "task": "sst2, accuracy",
        "method": "dense",
        "1": "90.0",
        "0.5": None,
        "0.2": None,
    }
    assert table[1]["method"] == OURS and (table[1]["0.5"], table[1]["0.2"]) == ("89.0", "88.0")
    assert len(table) == 2 * (1 + len(METHODS))


def test_the_figure_has_a_panel_a_task_and_a_line_a_method() -> None:
    figure = EXPERIMENT.figure(rows())
    assert [axes.get_title() for axes in figure.axes] == list(TASKS)
    for axes in figure.axes:
        labels = [line.get_label() for line in axes.get_lines()]
        assert labels == ["dense", *METHODS]
        looks = {(line.get_color(), line.get_marker()) for line in axes.get_lines()}
        assert len(looks) == len(labels)


def test_a_case_tells_its_row_from_others() -> None:
    assert Pruned("mrpc", OURS, 0.5).labels == {"task": "mrpc", "method": OURS, "MACs": 0.5}
