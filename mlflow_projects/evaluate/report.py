"""Figures of an evaluation, logged and printed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow_projects.evaluate.tasks import Figure


def log(figures: list[Figure], role: str, model: Any | None) -> None:
    """To this run; the model's own also to its logged model and the run that made it."""
    import mlflow

    prefix = "" if role == "model" else "baseline/"
    values = {f"{prefix}{f.name}": f.value for f in figures}
    values |= {f"{prefix}{f.name}_stderr": f.stderr for f in figures if f.stderr is not None}
    if role != "model" or model is None:
        mlflow.log_metrics(values)
        return
    mlflow.log_metrics(values, model_id=model.model_id)
    mlflow.log_metrics(values, run_id=model.source_run_id)


def as_csv(figures: Mapping[str, list[Figure]]) -> str:
    """A line a figure of a model."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["model", "figure", "value", "standard_error", "of"])
    for name, found in figures.items():
        rows.writerows([name, f.name, f.value, f.stderr, f.of] for f in found)
    return text.getvalue()


def as_table(figures: Mapping[str, list[Figure]]) -> str:
    """A line a figure, a column a model."""
    columns = list(figures)
    width = max(len(f.name) for found in figures.values() for f in found) + 2
    lines = [f"\n{'':<{width}}" + "".join(f"{Path(name).name[-22:]:>24}" for name in columns)]
    for index, first in enumerate(figures[columns[0]]):
        cells = ""
        for name in columns:
            found = figures[name][index]
            spread = "" if found.stderr is None else f" ± {found.stderr:.4f}"
            cells += f"{f'{found.value:.4f}{spread}':>24}"
        lines.append(f"{first.name:<{width}}{cells}   {first.of}")
    return "\n".join(lines)
