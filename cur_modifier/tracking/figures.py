"""Figures of a compression, by matplotlib's object interface: no pyplot, no global state.

They are made to be read in print and by the colour-blind: the colour maps grow evenly darker
(cividis), and what is chosen differs in shape or hatch too, not in colour alone.

Module names are read from their parts: ``model.layers.3.self_attn.q_proj`` is layer 3 (the first
number), projection ``q_proj`` (the last part).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE = "#0072B2"  # Okabe and Ito's palette
_GREY = "#C8C8C8"
_MAX_POINTS = 500  # a line; more are not seen
_MAX_PANEL_COLUMNS = 4
_MAX_ANNOTATED_CELLS = 250
_MAX_MAP_WIDTH_INCHES = 16.0


def spectra(spectra: Mapping[str, tuple[Sequence[float], int]]) -> Figure:
    """Singular-value decay: s_i / s_1 against i, one panel a projection, one line a layer.

    Args:
        spectra: module name to its singular values (descending) and the chosen rank, which is
            marked by a dot on the line. A module without a positive singular value has no line.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[int | None, Sequence[float], int]]] = defaultdict(list)
    for name, (values, rank) in spectra.items():
        layer, projection = _place(name)
        panels[projection].append((layer, values, rank))
    if not panels:
        return _empty("no factored modules")

    columns = min(len(panels), _MAX_PANEL_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.1 * columns + 1.0, 2.7 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    layers = sorted({layer for name in spectra if (layer := _place(name)[0]) is not None})
    cividis = _dark_cividis()
    low, high = (layers[0], max(layers[-1], layers[0] + 1)) if layers else (0, 1)
    for axes, (projection, lines) in zip(grid.flat, panels.items(), strict=False):
        for layer, values, rank in lines:
            colour = "black" if layer is None else cividis((layer - low) / (high - low))
            _draw_spectrum(axes, values, rank, colour)
        axes.set(title=projection, yscale="log", xlabel="index i")
        axes.xaxis.set_major_locator(_whole_numbers(most=5))
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel(r"singular value $\sigma_i / \sigma_1$")
    if len(layers) > 1:
        shown = [axes for axes in grid.flat if axes.figure is not None]
        colours = ScalarMappable(Normalize(low, high), cividis)
        figure.colorbar(colours, ax=shown, label="layer", pad=0.01).locator = _whole_numbers()
    figure.suptitle("Singular values by layer; a dot marks the chosen rank")
    return figure


def rank_map(ranks: Mapping[str, int]) -> Figure:
    """Rank by layer and projection; hatched where the module stays dense.

    Modules that share a cell (the experts of one layer) show their mean rank. Modules outside the
    layers (``lm_head``) are in the column "none". Numbers are written in the cells of small maps.

    Args:
        ranks: name of each factored module to its rank.
    """
    return _module_map(
        ranks, "Chosen rank of each factored module", "rank", "{:.0f}".format, _whole_numbers()
    )


def relative_error_map(errors: Mapping[str, float]) -> Figure:
    """Relative error by layer and projection, in percent; laid out as :func:`rank_map`.

    Args:
        errors: name of each factored module to ``‖(W − Ŵ) N‖ ÷ ‖W N‖``, in the norm of its fit.
    """
    return _module_map(
        {name: 100 * error for name, error in errors.items() if math.isfinite(error)},
        "Relative error of each factored module, in the norm of the fit",
        "relative error (%)",
        lambda percent: f"{percent:.1f}" if percent < 9.95 else f"{percent:.0f}",
    )


def _module_map(
    values: Mapping[str, float],
    title: str,
    label: str,
    written: Callable[[float], str],
    ticks: Any = None,
) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells: dict[tuple[str, int | None], list[float]] = defaultdict(list)
    for name, value in values.items():
        layer, projection = _place(name)
        cells[projection, layer].append(value)
    if not cells:
        return _empty("no factored modules")

    projections = list(dict.fromkeys(projection for projection, _ in cells))
    numbers = [layer for _, layer in cells if layer is not None]
    layers: list[int | None] = list(range(max(numbers) + 1)) if numbers else []
    if any(layer is None for _, layer in cells):
        layers.append(None)
    table = np.full((len(projections), len(layers)), np.nan)
    for (projection, layer), found in cells.items():
        table[projections.index(projection), layers.index(layer)] = sum(found) / len(found)

    figure = Figure(
        figsize=(
            min(max(0.36 * len(layers) + 2.6, 4.5), _MAX_MAP_WIDTH_INCHES),
            0.36 * len(projections) + 1.6,
        ),
        layout="constrained",
    )
    axes = figure.subplots()
    axes.patch.set(facecolor="white", hatch="////", edgecolor=_GREY)
    image = axes.imshow(table, cmap=_dark_cividis().reversed(), aspect="auto")
    _separate_cells(axes, len(projections), len(layers))
    axes.set_yticks(range(len(projections)), projections)
    step = math.ceil(len(layers) / 40)
    shown = [i for i, layer in enumerate(layers) if layer is None or i % step == 0]
    labels = ["none" if layers[i] is None else str(layers[i]) for i in shown]
    axes.set_xticks(shown, labels, fontsize=8)
    axes.set(xlabel="layer", title=title)
    if table.size <= _MAX_ANNOTATED_CELLS:
        _write_cells(axes, table, written)
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.01)
    if ticks is not None:
        bar.locator = ticks
    if np.isnan(table).any():
        dense = Patch(
            facecolor="white", hatch="////", edgecolor=_GREY, label="dense (not factored)"
        )
        figure.legend(handles=[dense], loc="outside lower right", frameon=False, fontsize=8)
    return figure


_COSTS = {
    "angular_distance": (
        "angular distance (units of π rad)",
        "Angular distance between the hidden states entering and leaving a layer",
    ),
    "expected_loss_growth_nats": (
        "growth of the loss (nats a token)",
        "What factoring a layer is expected to cost",
    ),
}


def layer_costs(metric: str, costs: Sequence[float], chosen: Sequence[int]) -> Figure:
    """What layers were chosen by, the chosen ones marked.

    Args:
        metric: ``angular_distance`` (in units of π; 0: same direction, 1: opposite) or
            ``expected_loss_growth_nats``.
        costs: by layer; what is not finite draws no bar.
        chosen: indices of the layers that are factored.
    """
    from matplotlib.figure import Figure

    label_y, title = _COSTS[metric]
    distances = [cost if math.isfinite(cost) else math.nan for cost in costs]
    marked = set(chosen)
    groups = (
        ("kept dense", [i for i in range(len(distances)) if i not in marked], _GREY, ""),
        ("chosen", sorted(marked), _BLUE, "////"),
    )
    figure = Figure(figsize=(max(0.22 * len(distances) + 1.5, 5.0), 3.2), layout="constrained")
    axes = figure.subplots()
    for label, layers, colour, hatch in groups:
        axes.bar(
            layers,
            [distances[layer] for layer in layers],
            color=colour,
            edgecolor="white" if hatch else "#707070",
            hatch=hatch,
            linewidth=0.5,
            label=label,
        )
    axes.set(
        xlabel="layer",
        ylabel=label_y,
        title=title,
        ylim=(0, None),
    )
    axes.title.set_fontsize(10)
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure


def kept_units(kept: Sequence[tuple[str, int, float]]) -> Figure:
    """The share of its units that each layer keeps, one line a kind.

    Args:
        kept: kind, layer and share.
    """
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for kind, layer, share in kept:
        lines[kind].append((layer, share))
    depth = max((layer for _, layer, _ in kept), default=0) + 1
    figure = Figure(figsize=(max(0.22 * depth + 1.5, 5.0), 3.2), layout="constrained")
    axes = figure.subplots()
    styles = (("o", _BLUE), ("s", "#D55E00"))
    for (kind, points), (marker, colour) in zip(sorted(lines.items()), styles, strict=False):
        layers, shares = zip(*sorted(points), strict=True)
        axes.plot(layers, shares, marker=marker, color=colour, label=kind)
    axes.set(xlabel="layer", ylabel="units kept ÷ before", ylim=(0, 1.05))
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def loss_curve(
    train: Sequence[tuple[int, float]],
    validation: Sequence[tuple[int, float]],
    rate: Sequence[tuple[int, float]],
    kept: int,
) -> Figure:
    """Training and validation loss by step, the step whose result is kept, and the learning rate.

    Args:
        train, validation, rate: ``(step, value)`` in order of steps; NaN and infinity leave a gap.
        kept: the step of the best validation loss; 0 where training gained nothing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    step = math.ceil(len(train) / _MAX_POINTS) if train else 1
    losses.plot(*_columns(train[::step]), color="#707070", linewidth=0.9, label="training")
    losses.plot(*_columns(validation), "o-", color=_BLUE, markersize=4, label="validation")
    losses.axvline(kept, color="black", linestyle=":", linewidth=1, label=f"kept: step {kept}")
    losses.set(ylabel="loss", title="Loss by step")
    if any(value > 0 for _, value in [*train, *validation] if math.isfinite(value)):
        losses.set_yscale("log")
    losses.legend(frameon=False, fontsize=8)
    rates.plot(*_columns(rate[::step]), color="#707070", linewidth=0.9)
    rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rates.xaxis.set_major_locator(_whole_numbers())
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    return figure


def refinement_curves(losses: Sequence[Sequence[float]]) -> Figure:
    """Training loss by step of every refined layer, shallow to deep from dark to light."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    shades = matplotlib.colormaps["viridis"].resampled(max(len(losses), 2))
    for index, curve in enumerate(losses):
        axes.plot(range(1, len(curve) + 1), curve, color=shades(index), linewidth=0.8)
    if any(value > 0 for curve in losses for value in curve):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="relative squared error", title="Refinement, layer by layer")
    mappable = matplotlib.cm.ScalarMappable(cmap=shades)
    mappable.set_clim(0, max(len(losses) - 1, 1))
    figure.colorbar(mappable, ax=axes, label="refined layer, in order of depth")
    axes.grid(alpha=0.3)
    return figure


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    values = [value if math.isfinite(value) else math.nan for _, value in points]
    return [step for step, _ in points], values


def _place(name: str) -> tuple[int | None, str]:
    parts = name.split(".")
    return next((int(part) for part in parts if part.isdigit()), None), parts[-1]


def _draw_spectrum(axes: Axes, values: Sequence[float], rank: int, colour: Any) -> None:
    first = values[0] if len(values) else 0.0
    if not first > 0:
        return
    step = math.ceil(len(values) / _MAX_POINTS)
    # A logarithmic axis has no zero: NaN leaves a gap.
    heights = [value / first if value > 0 else math.nan for value in values]
    axes.plot(range(1, len(values) + 1, step), heights[::step], color=colour, linewidth=0.9)
    axes.plot(
        rank, heights[rank - 1], "o", color=colour, markersize=4.5, mec="white", mew=0.6, zorder=3
    )


def _separate_cells(axes: Axes, rows: int, columns: int) -> None:
    axes.set_xticks([column - 0.5 for column in range(1, columns)], minor=True)
    axes.set_yticks([row - 0.5 for row in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)


def _write_cells(axes: Axes, table: Any, written: Callable[[float], str]) -> None:
    import numpy as np

    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (row, column), value in np.ndenumerate(table):
        if not math.isnan(value):
            # The colour map is reversed: large values are dark.
            colour = "white" if value > middle else "black"
            axes.text(
                column, row, written(value), ha="center", va="center", color=colour, fontsize=7
            )


def _dark_cividis() -> Any:
    """cividis without its palest tenth, which is lost on white paper."""
    import matplotlib
    import numpy as np
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["cividis"](np.linspace(0, 0.9, 256)))


def _whole_numbers(most: int = 10) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True)


def _empty(text: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 2))
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure
