"""Cases and findings of the decoder's removal."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from mlflow_projects.bench.quality.methods import recipe_of
from mlflow_projects.reproduce.pruning import EXPERIMENT, RATIOS

OPTIONS = argparse.Namespace(budgets=[], layers=10, seed=0)


def test_every_ratio_has_all_ways_in_16_and_in_4_bits() -> None:
    cases = EXPERIMENT.cases(OPTIONS)
    labels = [tuple(case.labels.values()) for case in cases]
    assert len(set(labels)) == len(cases) == 2 * (1 + len(RATIOS) * 7 + 1)
    four = [case for case in cases if case.labels["bits"] == 4]
    assert len(four) == len(cases) / 2 and all("GPTQModifier" in case.stages for case in four)


def test_recipes_are_ones_that_the_stages_take() -> None:
    modifiers = {
        name: getattr(pytest.importorskip(f"cur_modifier.modifiers.{module}.modifier"), name)
        for name, module in (("IDPruningModifier", "prune"), ("CURModifier", "cur"))
    }
    for case in EXPERIMENT.cases(OPTIONS):
        stage = recipe_of(case.stages)["compress_stage"]
        assert list(stage) == [f"{name}_modifiers" for name in case.stages]
        for group in stage.values():
            for name, fields in group.items():
                if name in modifiers:
                    assert modifiers[name](**fields).mlflow is False


def row(method: str, bits: int, perplexity: float | None, shapes: str = "") -> dict[str, Any]:
    labels = {"method": method, "shapes": shapes, "ratio": 1.0 if method == "dense" else 0.8}
    return labels | {"bits": bits, "MB": 100.0 * bits / 16, "perplexity wikitext": perplexity}


def test_the_best_removal_is_set_against_row_ids() -> None:
    rows = [
        row("dense", 16, 23.0),
        row("neurons", 16, 31.0, "uniform"),
        row("neurons", 16, 30.0, "free"),
        row("heads", 16, None, "free"),
        row("id", 16, 26.6),
        row("cur_healed", 4, None) | {"ratio": None},
        row("neurons", 4, 37.0, "free"),
    ]
    found = "\n".join(EXPERIMENT.findings(rows))
    assert "At 0.8 in 16 bits: neurons, free is the best removal with 30.0, `id` 26.6." in found
    assert "At 0.8 in 4 bits: neurons, free is the best removal with 37.0." in found
    assert "heads, free at 0.8, 16 bits; cur_healed, 4 bits." in found
    figure = EXPERIMENT.figure(rows)
    assert [axes.get_title() for axes in figure.axes] == ["16 bits", "4 bits"]
