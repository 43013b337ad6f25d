"""The table, the plot and the MLflow run of the serving benchmark."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cur_modifier.rows import Row
from mlflow_projects.bench.serving.forms import Variant

__all__ = ["log_run", "machine", "plot", "table"]

EXPERIMENT = "cur_modifier-serving"
COLOURS = {  # Okabe and Ito
    "id": "#0072B2",
    "cur": "#D55E00",
    "low_rank": "#CC79A7",
    "dense": "#009E73",
}
MARKERS = {None: "o", "W4A16": "s", "W8A8": "^"}


def name_of(row: Row) -> str:
    """The variant of a row."""
    return str(Variant(row["form"], row["ratio"], row["quantization"]))


def model_of(row: Row) -> str:
    """The model of a row, with the dtype where it is not the usual one."""
    return row["model"] if row["dtype"] == "bfloat16" else f"{row['model']}-{row['dtype']}"


def machine() -> str:
    """Processor and cores."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def table(rows: Sequence[Row]) -> str:
    """Speed over dense by phase and of loading, a line for each variant; in brackets the linear
    layers' own. Below a factored and quantized one, its speed over dense in the same bits."""
    phases = list(dict.fromkeys((r["phase"], r["batch"]) for r in rows if r["phase"] != "load"))
    lines = [f"Speed ÷ dense, on {machine()}; (linear layers alone)"]
    for model in dict.fromkeys(map(model_of, rows)):
        own = [row for row in rows if model_of(row) == model]
        header = f"{model:<26}{'bytes':>7}{'load':>6}"
        lines += ["", header + "".join(f"{f'{p} {b}':>15}" for p, b in phases)]
        for variant in dict.fromkeys(map(name_of, own)):
            found = {(r["phase"], r["batch"]): r for r in own if name_of(r) == variant}
            some = next(iter(found.values()))
            line = f"{variant:<26}{some['projection_bytes_ratio']:>7.3f}"
            line += f"{_cell(found.get(('load', 1)), 'dense'):>6}"
            lines.append(line + "".join(f"{_cell(found.get(p), 'dense'):>15}" for p in phases))
            if any(row.get("speedup_over_quantized") for row in found.values()):
                beside = f"{variant} ÷ {Variant('dense', None, some['quantization'])}"
                line = f"{beside:<33}{_cell(found.get(('load', 1)), 'quantized'):>6}"
                cells = (_cell(found.get(p), "quantized") for p in phases)
                lines.append(line + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def _cell(row: Row | None, beside: str) -> str:
    """How many times as fast, and over dense the linear layers alone; empty where not measured."""
    if row is None or row.get(f"speedup_over_{beside}") is None:
        return ""
    speed = f"{row[f'speedup_over_{beside}']:.2f}"
    linear = row.get("linear_speedup") if beside == "dense" else None
    return speed if linear is None else f"{speed} ({linear:.2f})"


def plot(rows: Sequence[Row]) -> Any:
    """Speed over bytes, a panel for each model and for decode and prefill at batch 1."""
    import numpy as np
    from matplotlib.figure import Figure

    from mlflow_projects.figures import label_within_decades

    models = list(dict.fromkeys(map(model_of, rows)))
    figure = Figure(figsize=(10, 4 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 2, squeeze=False)
    for model, line in zip(models, panels, strict=True):
        for phase, axes in zip(("decode", "prefill"), line, strict=True):
            shown = [
                row
                for row in rows
                if (model_of(row), row["phase"], row["batch"]) == (model, phase, 1)
            ]
            for row in shown:
                style: dict[str, Any] = {
                    "marker": MARKERS[row["quantization"]],
                    "color": COLOURS[row["form"]],
                }
                x = row["projection_bytes_ratio"]
                axes.plot(x, row["speedup_over_dense"], **style)
                axes.plot(x, row["linear_speedup"], fillstyle="none", **style)
                axes.annotate(
                    name_of(row),
                    (x, row["speedup_over_dense"]),
                    xytext=(5, 4),
                    textcoords="offset points",
                    fontsize=8,
                )
            least = min((row["projection_bytes_ratio"] for row in shown), default=0.5)
            x = np.linspace(min(0.95 * least, 0.5), 1, 50)
            axes.plot(x, 1 / x, "k--", linewidth=1, label="what the bytes allow")
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set(
                title=f"{model}, {phase}, batch 1",
                xlabel="bytes of the projections ÷ dense",
                ylabel="speed ÷ dense (open: linear layers alone)",
                yscale="log",
            )
            label_within_decades(axes.yaxis)
            axes.legend(loc="upper right")
            axes.grid(alpha=0.3, which="both")
    return figure


def log_run(rows: Sequence[Row], results: Path, figure: Path) -> None:
    """One MLflow run: every speed as a metric, with the files."""
    import mlflow

    known = mlflow.get_experiment_by_name(EXPERIMENT)
    experiment = known.experiment_id if known else mlflow.create_experiment(EXPERIMENT)
    with mlflow.start_run(experiment_id=experiment, run_name="bench-serving"):
        mlflow.log_params({"machine": machine(), "vllm": rows[-1]["vllm"]})
        for row in rows:
            where = f"{model_of(row)}/{name_of(row)}/{row['phase']}-{row['batch']}"
            for what in (
                "tokens_per_second",
                "speedup_over_dense",
                "speedup_over_quantized",
                "linear_speedup",
            ):
                if row.get(what) is not None:
                    mlflow.log_metric(f"{where}/{what}", row[what])
        mlflow.log_artifact(str(results))
        mlflow.log_artifact(str(figure))
        mlflow.log_text(table(rows), "table.txt")
