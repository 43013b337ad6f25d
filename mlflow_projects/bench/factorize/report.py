"""The table, the figure and the MLflow run of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mlflow_projects.figures import GREY, PALETTE

COLOURS = (*PALETTE, GREY)
MARKERS = {"cur": "o", "id": "s", "other": "^"}
HEADER = (
    f"{'shape':>11}  {'method':<24}{'cpu s':>8}{'wall s':>8}{'ref/cpu':>8}"
    f"{'error':>9}{'best':>8}{'activation':>12}"
)


def line(row: Mapping[str, Any]) -> str:
    """One row of the printed table."""
    faster = row.get("reference_cpu_ratio")
    return (
        f"{_shape(row):>11}  {row['method']:<24}"
        f"{row['cpu_seconds']:8.3f}{row['wall_seconds']:8.3f}"
        f"{'' if faster is None else f'{faster:.1f}':>8}"
        f"{row['relative_error']:9.4f}{row['best_relative_error']:8.4f}"
        f"{row['activation_error']:12.4f}"
    )


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """CPU seconds against error, a panel a shape; a line marks the best error of the rank."""
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(3.4 * len(shapes) + 2.6, 4.4), layout="constrained")
    grid = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(grid, shapes, strict=True):
        for row in rows:
            if _shape(row) != shape:
                continue
            colour, marker = _style(row["method"], methods)
            axes.scatter(
                row["cpu_seconds"], row["relative_error"], color=colour, marker=marker, s=36
            )
            best = row["best_relative_error"]
        axes.axhline(best, color="black", linestyle="--", linewidth=1)
        axes.set(xscale="log", title=shape, xlabel="CPU time, s")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel(r"relative error $\|W - \hat{W}\|_F\,/\,\|W\|_F$")
    for method in methods:
        colour, marker = _style(method, methods)
        grid[-1].scatter([], [], color=colour, marker=marker, label=method)
    grid[-1].plot([], [], color="black", linestyle="--", linewidth=1, label="best of the rank")
    figure.legend(*grid[-1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def log_run(rows: Sequence[Mapping[str, Any]], results: Path, figure: Path) -> None:
    """One MLflow run with every time and error as a metric, and the files."""
    import mlflow

    with mlflow.start_run():
        mlflow.log_params({"rank": rows[0]["rank"], "threads": rows[0]["threads"]})
        metrics = {}
        for row in rows:
            name = f"{_shape(row)}/{row['method']}"
            metrics |= {f"{name}/{what}": row[what] for what in ("cpu_seconds", "relative_error")}
        mlflow.log_metrics(metrics)
        mlflow.log_artifact(str(results))
        mlflow.log_artifact(str(figure))


def _shape(row: Mapping[str, Any]) -> str:
    return "x".join(map(str, row["shape"]))


def _style(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """Colour and marker: a marker a family, a colour a member."""
    family = [name for name in methods if _family(name) == _family(method)]
    return COLOURS[family.index(method) % len(COLOURS)], MARKERS[_family(method)]


def _family(method: str) -> str:
    return method.split()[0] if method.split()[0] in MARKERS else "other"
