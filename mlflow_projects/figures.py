"""Figures of the MLflow projects; readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from cur_modifier.checkpoint.files import replacing

BLUE, GREY = "#0072B2", "#999999"  # Okabe and Ito's palette
PALETTE = (BLUE, "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def put_figure(path: Path, figure: Figure) -> None:
    """Write a figure, whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150)


def label_within_decades(axis: Any) -> None:
    """Label an axis on a log scale as often as its range takes, where it has few powers of ten.

    Call it when the data are drawn.
    """
    low, high = axis.get_view_interval()
    few = (1, 1.5, 2, 3, 5, 7)
    many = (1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    axis.set_major_locator(LogLocator(subs=many if high < 4 * low else few))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def before_after(after: Sequence[Any], before: Sequence[Any]) -> Figure:
    """Each figure of two models side by side: perplexities and the like, and scores, in panels of
    their own.

    Args:
        after: of the model: items with ``name`` (``perplexity/TEXT`` or ``TASK/METRIC``),
            ``value``, ``higher_is_better`` and ``stderr``, drawn as a bar of error where it is
            known.
        before: of the baseline, the same names.
    """
    pairs = list(zip(after, before, strict=True))
    panels = {
        "perplexity (lower is better)": [p for p in pairs if not p[0].higher_is_better],
        "score (higher is better)": [p for p in pairs if p[0].higher_is_better],
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


def pareto(done: Sequence[Any], front: Sequence[Any]) -> Figure:
    """Bytes against perplexity of finished trials, both on log scales, with the front as steps.

    Args:
        done: items with ``point`` (``form``, ``ratio``, ``quantization``), ``bytes`` and
            ``perplexity``; the form is the marker's shape, the quantization its colour.
        front: those of ``done`` that no other beats in both, by bytes.
    """
    shapes = dict(zip(("dense", "id", "cur"), "so^", strict=True))
    quantizations = sorted({d.point.quantization for d in done})
    colours = dict(zip(quantizations, PALETTE, strict=False))
    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.step(
        [d.bytes / 1e6 for d in front],
        [d.perplexity for d in front],
        where="post",
        color="black",
        linewidth=1,
        zorder=1,
    )
    for d in done:
        on_front = d in front
        axes.scatter(
            d.bytes / 1e6,
            d.perplexity,
            marker=shapes[d.point.form],
            s=64,
            facecolor=colours[d.point.quantization] if on_front else "white",
            edgecolor=colours[d.point.quantization],
            linewidth=1.5,
            zorder=2,
        )
        if d.point.form != "dense":
            axes.annotate(
                f"{d.point.ratio:g}",
                (d.bytes / 1e6, d.perplexity),
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=8,
            )
    for form in sorted({d.point.form for d in done}):
        axes.scatter([], [], marker=shapes[form], color=GREY, label=form)
    for quantization, colour in colours.items():
        axes.plot([], [], color=colour, linewidth=4, label=quantization)
    axes.plot([], [], color="black", linewidth=1, label="Pareto front (filled)")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="checkpoint on disk, MB",
        ylabel="perplexity",
        title="Size against perplexity; numbers are ratios",
    )
    for axis in (axes.xaxis, axes.yaxis):
        label_within_decades(axis)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    return figure
