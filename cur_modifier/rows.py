"""Rows of measured figures in a JSON file, which is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cur_modifier.checkpoint.files import put_text

__all__ = ["Row", "put_row", "put_rows", "read_rows", "refuse_others"]

Row = dict[str, Any]


def read_rows(path: Path, key: Callable[[Row], object]) -> list[Row]:
    """The rows in a file, none where there is no file.

    Args:
        key: what a row measures.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        rows: list[Row] = json.loads(path.read_text())
        for row in rows:
            key(row)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a list of measured rows ({error!r}). Move it away, or name another "
            "file."
        ) from None
    return rows


def refuse_others(path: Path, rows: Sequence[Row], settings: Mapping[str, object]) -> None:
    """Make sure that rows may stand in one table with those to come.

    Args:
        settings: what all rows of a file share, by field; None is the default, which rows leave
            out.

    Raises:
        ValueError: a row was measured under others.
    """
    for row in rows:
        other = [name for name, value in settings.items() if row.get(name) != value]
        if other:
            name = other[0]
            raise ValueError(
                f"{path} holds rows of another {name} ({row.get(name) or 'the default'}, now "
                f"{settings[name] or 'the default'}): they would not compare. Name another file."
            )


def put_row(path: Path, row: Row, key: Callable[[Row], object]) -> None:
    """Add a row in place of an earlier one that measured the same."""
    put_rows(path, [other for other in read_rows(path, key) if key(other) != key(row)] + [row])


def put_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    put_text(path, json.dumps(rows, indent=2) + "\n")
