"""Rows, totals and the printed table of a removal."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.prune.report import UnitRecord, format_table, totals


def record(kind: str, layer: int, after: int, **fields: Any) -> UnitRecord:
    before, cost = (24, 48) if kind == "neurons" else (4, 100)
    given = {"name": f"layers.{layer}.{kind}", "before": before, "cost": cost}
    return UnitRecord(layer=layer, kind=kind, after=after, **given | fields)


def test_a_row_is_flat() -> None:
    row = record("neurons", 1, 16, relative_error=0.25).row()
    assert row["name"] == "layers.1.neurons" and row["after"] == 16
    assert row["relative_error"] == 0.25 and row["expected_growth"] is None
    assert all(value is None or isinstance(value, int | float | str) for value in row.values())


def test_totals_are_what_the_budget_counts_and_what_the_model_has() -> None:
    records = [
        record("neurons", 0, 16, seconds=1.5),
        record("neurons", 1, 20, seconds=0.5),
        record("heads", 0, 2),
    ]
    metrics = totals(records, (5000, 4224), (10000, 9200))
    assert metrics == {
        "neurons_before": 48,
        "neurons_after": 36,
        "heads_before": 4,
        "heads_after": 2,
        "ratio_budget": 4224 / 5000,
        "parameters_model_before": 10000,
        "parameters_model_after": 9200,
        "ratio_model": 0.92,
        "removing_seconds": 2.0,
    }


def test_nothing_removed_leaves_all() -> None:
    metrics = totals([], (5000, 5000), (10000, 10000))
    assert metrics["ratio_budget"] == metrics["ratio_model"] == 1
    assert metrics["removing_seconds"] == 0
    assert len(format_table([], metrics, "parameters").splitlines()) == 2


def test_the_table_has_a_line_for_every_kind_and_size() -> None:
    records = [
        record("neurons", 0, 16, relative_error=0.25, seconds=1.0),
        record("neurons", 1, 20, relative_error=0.5, seconds=0.5),
        record("heads", 0, 2, relative_error=0.125, seconds=0.25),
        record("neurons", 2, 10, before=20),
    ]
    table = format_table(records, totals(records, (5000, 4224), (10000, 9200)), "MACs")
    head, *lines, last = table.splitlines()
    assert head.split()[:4] == ["units", "layers", "before", "after"]
    assert [line.split() for line in lines] == [
        ["neurons", "2", "24", "16–20", "0.750", "0.250–0.500", "1.5"],
        ["heads", "1", "4", "2", "0.500", "0.125", "0.2"],
        ["neurons", "1", "20", "10", "0.500", "unknown", "0.0"],
    ]
    assert last.startswith("MACs after ÷ before: 0.8448 over the budget, parameters 0.9200")
    assert "(10,000 → 9,200)" in last
