"""Figures of the MLflow projects; readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"  # Okabe and Ito's palette


def before_after(after: Sequence[Any], before: Sequence[Any]) -> Figure:
    """Each figure of two models side by side, perplexities and accuracies in panels of their own.

    Args:
        after: of the model: items with ``name`` (``perplexity/TEXT`` or ``TASK/METRIC``), ``value``
            and ``stderr``, drawn as a bar of error where it is known.
        before: of the baseline, the same names.
    """
    pairs = list(zip(after, before, strict=True))
    panels = {
        "perplexity (lower is better)": [p for p in pairs if p[0].name.startswith("perplexity/")],
        "score (higher is better)": [p for p in pairs if not p[0].name.startswith("perplexity/")],
    }
    panels = {title: rows for title, rows in panels.items() if rows}
    most = max(len(rows) for rows in panels.values())
    figure = Figure(figsize=(5.2 * len(panels), 1.2 + 0.55 * most), layout="constrained")
    for axes, (title, rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for offset, which, label, colour, hatch in (
            (-0.2, 1, "before", GREY, ""),
            (0.2, 0, "after", BLUE, "//"),
        ):
            bars = axes.barh(
                [i + offset for i in range(len(rows))],
                [row[which].value for row in rows],
                xerr=[row[which].stderr or 0.0 for row in rows],
                height=0.38,
                label=label,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                ecolor="black",
            )
            axes.bar_label(bars, fmt="{:.4g}", padding=3, fontsize=8)
        axes.set(xlabel=title)
        axes.margins(x=0.16)
        names = [row[0].name.removeprefix("perplexity/") for row in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure
