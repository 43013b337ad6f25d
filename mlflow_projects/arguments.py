"""What the command lines of the MLflow projects share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from cur_modifier.compress import check_folder, count, whole

__all__ = [
    "check_folder",
    "check_output",
    "count",
    "count_or_none",
    "elsewhere",
    "names",
    "shares",
    "text_name",
    "whole",
]


def count_or_none(text: str) -> int | None:
    """A whole number from 0, where 0 stands for no limit, or for the default."""
    return whole(text) or None


def names(text: str) -> list[str]:
    """A comma-separated list; the empty text is the empty list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def shares(text: str) -> list[float]:
    """A comma-separated list of numbers between 0 and 1; the empty text is the empty list."""
    found = []
    for part in names(text):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 0 < value < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not a share between 0 and 1, as 0.5.")
        found.append(value)
    return found


def text_name(text: str) -> str:
    """How a text is called in figures: its file's name without the ending, with a dash for what
    MLflow refuses in names."""
    path = Path(text)
    name = Path(path.name.removesuffix(".gz")).stem if path.exists() else path.name
    return re.sub(r"[^\w. -]", "-", name)


def elsewhere(path: str | Path, project: Path) -> str:
    """What to add of a path that is not there, where `mlflow run` has changed the folder."""
    if Path(path).is_absolute() or Path.cwd() != project:
        return ""
    return f" in {project}: give a whole path"


def check_output(parser: argparse.ArgumentParser, output: Path, project: Path) -> None:
    """End with an error where ``output`` is no folder that can be written to, or lies in the
    project's own."""
    if not output.is_absolute() and Path.cwd() == project:
        parser.error(
            f"output {output} would lie in the project's own folder, where `mlflow run` starts. "
            "Give a whole path: -P output=$PWD/out."
        )
    check_folder(parser, "output", output)
