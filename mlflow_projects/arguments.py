"""What the command lines of the MLflow projects share."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path


def count(text: str) -> int:
    """A whole number from 1; MLflow writes those of a project as 64.0 or 64."""
    return _whole(text, 1)


def count_or_none(text: str) -> int | None:
    """A whole number from 0, where 0 stands for no limit, or for the default."""
    return whole(text) or None


def whole(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def names(text: str) -> list[str]:
    """A comma-separated list; the empty text is the empty list."""
    return [part.strip() for part in text.split(",") if part.strip()]


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


def check_folder(parser: argparse.ArgumentParser, option: str, folder: Path) -> None:
    """End with an error where ``folder`` can't be made or written to."""
    held = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not held.is_dir():
        within = "" if held == folder else f" lies below {held}, which"
        parser.error(f"{option} {folder}{within} is a file. Name a folder.")
    if not os.access(held, os.W_OK | os.X_OK):
        parser.error(f"{option} {folder}: no permission to write in {held}. Name another folder.")


def _whole(text: str, least: int) -> int:
    try:
        value = float(text)
        if value != int(value) or value < least:
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least}.") from None
    return int(value)
