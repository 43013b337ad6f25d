"""What the rows of the experiment with convolutions show: a figure, and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from mlflow_projects.figures import PALETTE
from mlflow_projects.reproduce.channels import METHODS, OURS, PUBLISHED, UNCORRECTED

__all__ = ["KEPT", "figure", "findings"]

KEPT = (0.8, 0.6, 0.5, 0.35, 0.25)
WITHIN, LOST = 0.02, 0.05  # of accuracy: what counts as kept, and what as lost
_BEST = "magnitude"  # the better of the norms
_TOLD = (OURS, PUBLISHED, UNCORRECTED, _BEST)
MAGNITUDES = tuple(method for method in METHODS if method.startswith(_BEST))
_CLAIM = (
    "that an interpolative decomposition keeps the accuracy without fine-tuning where pruning by "
    "magnitude loses it"
)


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against multiply-accumulates, a panel a network, a line a method."""
    networks = _networks(rows)
    drawn = Figure(figsize=(4.9 * len(networks), 4.0), layout="constrained")
    grid = drawn.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    styles = dict(zip(METHODS, ("o-", "s--", "^-.", "v:", "D:"), strict=True))
    for axes, network in zip(grid, networks, strict=True):
        own = [row for row in rows if row["network"] == network]
        dense = next(row for row in own if row["method"] == "dense")
        axes.axhline(100 * dense["accuracy"], color="black", linewidth=1, label="dense")
        for colour, (method, style) in zip(PALETTE, styles.items(), strict=False):
            found = [dense, *(row for row in own if row["method"] == method)]
            axes.plot(
                [row["MACs kept"] for row in found],
                [100 * row["accuracy"] for row in found],
                style,
                color=colour,
                label=method,
            )
        axes.axhline(10, color="black", linewidth=1, linestyle=":", label="chance")
        axes.set(title=network, xlabel="multiply-accumulates kept")
        axes.set_xlim(1.02, 0.2)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("accuracy on 1000 test images, %")
    grid[0].set_ylim(bottom=0)
    drawn.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawn


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences that the rows bear out, for or against the claim."""
    found, holds, worse = [], [], []
    for network in _networks(rows):
        own = [row for row in rows if row["network"] == network]
        dense = next(row["accuracy"] for row in own if row["method"] == "dense")
        shares = sorted({row["MACs asked"] for row in own if row["method"] != "dense"})
        told = dict.fromkeys((min(shares, key=lambda kept: abs(kept - 0.5)), shares[0]))
        scores = {
            (m, kept): _accuracy(own, m, kept)
            for m in (OURS, PUBLISHED, UNCORRECTED)
            for kept in shares
        }
        largest = {kept: max(_accuracy(own, m, kept) for m in MAGNITUDES) for kept in shares}
        scores |= {(_BEST, kept): score for kept, score in largest.items()}
        reach = {m: _reach(dense, {kept: scores[m, kept] for kept in shares}) for m in _TOLD}
        found += [
            f"{network}: {dense:.1%} dense"
            + "".join(
                f"; at {kept:g} of the multiply-accumulates "
                + ", ".join(f"{scores[m, kept]:.1%} by {m}" for m in _TOLD)
                for kept in told
            )
            + ".",
            f"{network}: within {WITHIN * 100:g} points of the dense accuracy stay "
            + ", ".join(f"{m} {reach[m]}" for m in _TOLD)
            + ".",
        ]
        holds.append(
            any(
                dense - scores[PUBLISHED, kept] <= WITHIN < LOST < dense - largest[kept]
                for kept in shares
            )
        )
        worse.append(scores[UNCORRECTED, shares[-1]] < largest[shares[-1]])
    if all(worse):
        found.append(
            "Ours chooses channels that the others can stand for: without the correction they do "
            "worse than those of the largest filters."
        )
    verdict = "holds" if all(holds) else "does **not** hold"
    return [*found, f"The claim {_CLAIM} {verdict} on {' and '.join(_networks(rows))}."]


def _networks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["network"] for row in rows))


def _accuracy(rows: Sequence[Mapping[str, Any]], method: str, kept: float) -> float:
    wanted = {"method": method, "MACs asked": kept}
    value: float = next(row for row in rows if wanted.items() <= row.items())["accuracy"]
    return value


def _reach(dense: float, scores: Mapping[float, float]) -> str:
    """Down to which share all scores are near the dense one."""
    least = None
    for kept in sorted(scores, reverse=True):
        if dense - scores[kept] > WITHIN + 1e-9:
            break
        least = kept
    return "nowhere" if least is None else f"down to {least:g}"
