"""Finished rows of protocol P: the tables that are printed of them, and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cur_modifier.rows import Row

__all__ = ["format_tables", "key", "plot"]

TEXTS = "ppl_"  # every perplexity is in a field of this prefix


def key(row: Row) -> tuple[str, float | None, str]:
    """What a row measures: method, ratio (None where the method has its own) and calibration."""
    return row["method"], row["ratio"], row["calibration"]


def format_tables(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """One table for each calibration and text: methods down, ratios across.

    Args:
        methods: the order of the lines; others follow.
    """
    names = [*methods, *sorted({row["method"] for row in rows} - set(methods))]
    texts = dict.fromkeys(name for row in rows for name in row if name.startswith(TEXTS))
    calibrations = dict.fromkeys(row["calibration"] for row in rows)
    return "\n\n".join(
        table
        for calibration in calibrations
        for text in texts
        if (table := _table(rows, names, calibration, text))
    )


def plot(rows: Sequence[Row], methods: Sequence[str]) -> Any:
    """Perplexity (log scale) over the ratio stored, a panel for each calibration and text.

    Args:
        methods: the order of the legend; others follow. ``dense`` is a line across.
    """
    from matplotlib.figure import Figure

    from mlflow_projects.figures import GREY, PALETTE, label_within_decades

    names = [*methods, *sorted({row["method"] for row in rows} - set(methods))]
    drawn = [n for n in names if n != "dense" and any(row["method"] == n for row in rows)]
    texts = list(dict.fromkeys(name for row in rows for name in row if name.startswith(TEXTS)))
    calibrations = list(dict.fromkeys(row["calibration"] for row in rows))
    size = (1.6 + 4.2 * len(texts), 0.6 + 3.6 * len(calibrations))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(calibrations), len(texts), squeeze=False, sharex=True, sharey="col")
    style = {  # where the palette begins again the marker is another
        name: {"color": PALETTE[i % len(PALETTE)], "marker": "osD^vP*X"[i % 8]}
        for i, name in enumerate(drawn)
    }
    for panels, calibration in zip(grid, calibrations, strict=True):
        for axes, text in zip(panels, texts, strict=True):
            here = [r for r in rows if r["calibration"] == calibration and text in r]
            for name in drawn:
                found = sorted((r["stored_ratio"], r[text]) for r in here if r["method"] == name)
                if found:
                    axes.plot(*zip(*found, strict=True), label=name, linewidth=1.2, **style[name])
            for row in here:
                if row["method"] == "dense":
                    axes.axhline(row[text], color=GREY, linestyle="--", label="dense")
            axes.set(
                title=f"on {text.removeprefix(TEXTS)}, calibrated on {calibration}",
                xlabel="parameters stored ÷ dense, of the projections",
                ylabel="perplexity",
                yscale="log",
            )
            label_within_decades(axes.yaxis)
            axes.grid(alpha=0.3, which="both")
    # One entry a method, whichever panel has it.
    entries = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside right upper")
    return figure


def _table(rows: Sequence[Row], methods: Sequence[str], calibration: str, text: str) -> str:
    cells = {
        (row["method"], row["ratio"]): row
        for row in rows
        if row["calibration"] == calibration and text in row
    }
    if not cells:
        return ""
    ratios = sorted({ratio for _, ratio in cells if ratio is not None}, reverse=True)
    lines = [
        f"Perplexity on {text.removeprefix(TEXTS)}, calibrated on {calibration}; "
        "by parameters stored after ÷ before",
        f"{'':<14}"
        + "".join(f"{ratio:>10g}" for ratio in ratios)
        + (f"{'its own':>20}" if any(ratio is None for _, ratio in cells) else ""),
    ]
    for method in methods:
        found = {ratio: row for (name, ratio), row in cells.items() if name == method}
        if not found:
            continue
        line = f"{method:<14}" + "".join(
            f"{_number(found[ratio][text]) if ratio in found else '':>10}" for ratio in ratios
        )
        if None in found:
            own = f"{_number(found[None][text])} at {found[None]['stored_ratio']:.3f}"
            line += f"{own:>20}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _number(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1e5 else f"{perplexity:.1e}"
