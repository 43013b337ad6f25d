"""Rows of figures that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cur_modifier.rows import Row, put_row, put_rows, read_rows, refuse_others


def key(row: Row) -> object:
    return row["method"], row["ratio"]


ROWS: list[Row] = [{"method": "id", "ratio": 0.8, "ppl": 2}, {"method": "cur", "ratio": 0.8}]


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    assert read_rows(path, key) == []
    put_rows(path, ROWS)
    assert read_rows(path, key) == ROWS
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_a_row_takes_the_place_of_one_that_measured_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    put_rows(path, ROWS)
    put_row(path, {"method": "id", "ratio": 0.8, "ppl": 3}, key)
    assert read_rows(path, key) == [ROWS[1], {"method": "id", "ratio": 0.8, "ppl": 3}]


@pytest.mark.parametrize("text", ["{", "3", '[{"ratio": 1}]', '["text"]'])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"not a list of measured rows.*Move it away"):
        put_row(path, ROWS[0], key)
    assert path.read_text() == text


def test_rows_of_other_settings_are_refused() -> None:
    path = Path("rows.json")
    refuse_others(path, [{"model": "a"}], {"model": "a", "data": None})
    with pytest.raises(ValueError, match=r"rows of another model \(a, now b\)"):
        refuse_others(path, [{"model": "a"}], {"model": "b"})
    with pytest.raises(ValueError, match=r"rows of another data \(the default, now c4\)"):
        refuse_others(path, [{"model": "a"}], {"data": "c4"})
