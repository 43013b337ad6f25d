"""Figures of the experiments; readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from mlflow_projects.figures import BLUE, GREY, PALETTE, label_within_decades

ORANGE = "#D55E00"
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
MAP_CELLS = 64  # a side of a weight's map


def lollipops(rows: Sequence[Mapping[str, Any]], label: str, texts: Sequence[str]) -> Figure:
    """Perplexity by case, a panel a text, on a log scale, as far from the dense model's line."""
    dense, *others = rows
    figure = Figure(figsize=(4.6 * len(texts), 1.4 + 0.38 * len(others)), layout="constrained")
    grid = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(grid, texts, strict=True):
        level = dense[f"perplexity {text}"]
        axes.axvline(level, color="black", linestyle="--", label="dense")
        for height, row in enumerate(others):
            value = row[f"perplexity {text}"]
            axes.plot([level, value], [height, height], color=BLUE, linewidth=2)
            axes.plot(value, height, "o", color=BLUE)
            axes.annotate(
                f"{value:.4g}",
                (value, height),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set(xscale="log", xlabel=f"perplexity, {text}")
        label_within_decades(axes.xaxis)
        axes.margins(x=0.2)
        axes.set_yticks(range(len(others)), [str(row[label]) for row in others])
        axes.grid(axis="x", alpha=0.25)
    grid[0].set_ylabel(label)
    grid[0].set_ylim(len(others) - 0.5, -0.5)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", fontsize=8)
    return figure


def ranks(rows: Sequence[Mapping[str, Any]], kept: float) -> Figure:
    """Rank against perplexity, a line a fit, and the band in which it counts as kept."""
    dense, *others = rows
    figure = Figure(figsize=(6.6, 4.2), layout="constrained")
    axes = figure.subplots()
    names = {"weight": ("C⁺ W R⁺ (published)", ORANGE, "^--"), "gram": ("fitted", BLUE, "o-")}
    for fit, (name, colour, style) in names.items():
        found = [row for row in others if row["fit"] == fit]
        axes.plot(
            [row["largest rank"] for row in found],
            [row["perplexity wikitext"] for row in found],
            style,
            color=colour,
            label=name,
        )
    level = dense["perplexity wikitext"]
    axes.axhspan(level, kept * level, color=GREY, alpha=0.5, label=f"within {kept - 1:.0%}")
    axes.axhline(level, color="black", linewidth=1, label="dense")
    axes.set(
        xscale="log", yscale="log", xlabel="largest rank", ylabel="perplexity, WikiText-2 test"
    )
    label_within_decades(axes.yaxis)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xticks([row["largest rank"] for row in others if row["fit"] == "gram"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def matrix(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> Figure:
    """Perplexity ÷ dense: a row a calibration text, a column an evaluation text."""
    dense, *others = rows
    table = [
        [row[f"perplexity {text}"] / dense[f"perplexity {text}"] for text in texts]
        for row in others
    ]
    figure = Figure(figsize=(1.6 + 1.2 * len(texts), 1.2 + 0.7 * len(others)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="cividis_r", aspect="auto")
    middle = (min(map(min, table)) + max(map(max, table))) / 2
    for y, values in enumerate(table):
        for x, value in enumerate(values):
            colour = "white" if value > middle else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(texts)), texts)
    axes.set_yticks(range(len(others)), [row["calibrated on"] for row in others])
    axes.set(xlabel="evaluated on", ylabel="calibrated on", title="Perplexity ÷ dense")
    figure.colorbar(image, ax=axes)
    return figure


def scores(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> Figure:
    """Score against the share of multiply-accumulates: a panel a task, a line a method."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * lines + 0.7), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    looks = dict(zip(methods, zip(PALETTE, "osD^vX*", _DASHES, strict=False), strict=False))
    for axes, task in zip(grid.flat, tasks, strict=False):
        own = [row for row in rows if row["task"] == task]
        dense = next(row for row in own if row["method"] == "dense")
        axes.axhline(100 * dense["score"], color="black", linewidth=1, label="dense")
        for method, (colour, marker, dash) in looks.items():
            found = sorted(
                (row["MACs"], 100 * row["score"]) for row in own if row["method"] == method
            )
            if found:
                axes.plot(
                    *zip(*found, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle=dash,
                    linewidth=2.2 if method == methods[0] else 1.3,
                    label=method,
                )
        axes.set(title=task, xlabel="multiply-accumulates left", ylabel=f"{dense['metric']}, %")
        axes.set_xticks(sorted({row["MACs"] for row in own}))
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.remove()
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    return figure


def sizes(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity against megabytes, a panel a number of bits, a line a method."""
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    figure = Figure(figsize=(5.0 * len(bits), 4.6), layout="constrained")
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "dense"))
    looks = zip(names, cycle(PALETTE), cycle("osD^vX*P"), cycle(_DASHES), strict=False)
    styles = {name: look for name, *look in looks}
    for axes, width in zip(figure.subplots(1, len(bits), squeeze=False)[0], bits, strict=True):
        own = [r for r in rows if r["bits"] == width and r["perplexity wikitext"] is not None]
        for row in own:
            if row["name"] == "dense":
                axes.plot(row["MB"], row["perplexity wikitext"], "k*", markersize=10, label="dense")
        for name, (colour, marker, dash) in styles.items():
            found = sorted((r["MB"], r["perplexity wikitext"]) for r in own if r["name"] == name)
            if found:
                axes.plot(
                    *zip(*found, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle=dash,
                    label=name,
                )
        axes.set(
            yscale="log",
            title=f"{width} bits",
            xlabel="checkpoint, MB",
            ylabel="perplexity, WikiText-2",
        )
        label_within_decades(axes.yaxis)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def decay(values: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """Singular values ÷ the largest: a panel a projection, a line a layer, dark to light."""
    import matplotlib

    columns = min(4, len(values))
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(3 * columns + 1, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    shades = matplotlib.colormaps["cividis"]
    deepest = max(max(layers) for layers in values.values()) or 1
    for axes, (projection, layers) in zip(grid.flat, values.items(), strict=False):
        for layer, spectrum in layers.items():
            first = spectrum[0]
            axes.plot(
                range(1, len(spectrum) + 1),
                [value / first for value in spectrum],
                color=shades(0.9 * layer / deepest),
                linewidth=0.8,
            )
        axes.set(title=projection, yscale="log", xlabel="index i", ylim=(1e-3, 1.2))
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(values) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel(r"$\sigma_i / \sigma_1$")
    figure.suptitle("Singular values by layer, first dark, last light")
    return figure


def structure(maps: Mapping[str, Mapping[int, Any]], layers: Sequence[int]) -> Figure:
    """Mean |W| over blocks: a row a projection, a column a layer, each map on its own scale."""
    figure = Figure(figsize=(1.5 * len(layers) + 1.4, 1.5 * len(maps)), layout="constrained")
    grid = figure.subplots(len(maps), len(layers), squeeze=False)
    for row, (projection, found) in zip(grid, maps.items(), strict=True):
        for axes, layer in zip(row, layers, strict=True):
            axes.imshow(found[layer], cmap="cividis", aspect="auto", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if projection == next(iter(maps)):
                axes.set_title(f"layer {layer}", fontsize=9)
        row[0].set_ylabel(projection, fontsize=9)
    figure.suptitle("Mean |W| by block: outputs down, inputs across; bright is large")
    return figure
