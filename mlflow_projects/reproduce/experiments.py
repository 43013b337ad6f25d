"""The experiments of the systems that this package unites: what each runs, draws and claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlflow_projects.reproduce import convolution, draw, pruning, stat
from mlflow_projects.reproduce.cases import Case, Experiment, Row, Settings
from mlflow_projects.reproduce.domains import NAMES as DOMAINS
from mlflow_projects.reproduce.perplexities import Perplexities

# CURing (Park and Moon 2025): q, k and gate of ten layers, DEIM on WANDA scores, U = C⁺ W R⁺.
CURING: Settings = {
    "targets": ["re:.*(q|k|gate)_proj$"],
    "form": "cur",
    "scores": "wanda",
    "selection": "deim",
    "fit": "weight",
    "multiple_of": 1,
    "rank": {"max": 256},
}
# The whole model, for what depends on the calibration: the closed form without a budget.
EVERYTHING: Settings = {
    "targets": ["re:.*(q|k|v|o|gate|up|down)_proj$"],
    "form": "id",
    "fit": "gram",
    "rank": {"ratio": 0.8},
    "layers": {"select": "all"},
}
KEPT = 1.02  # perplexity ÷ dense that counts as kept


def ratio(row: Row, dense: Row, text: str = "wikitext") -> float:
    """Perplexity ÷ that of the dense model."""
    return row[f"perplexity {text}"] / dense[f"perplexity {text}"]


# -- CURing, no healing ------------------------------------------------------------------------


def _cur(labels: Row, settings: Settings, calibrate: str = "wikitext") -> Case:
    return Case(labels, {"CURModifier": settings}, calibrate)


def _curing(options: Any) -> list[Case]:
    layers, seed = options.layers, options.seed
    counts = [count for count in (2, 5) if count < layers] + [layers]
    return [Case({"layers": 0})] + [
        _cur({"layers": count}, CURING | _angular(count, seed)) for count in counts
    ]


def _angular(layers: int, seed: int) -> Settings:
    return {"layers": {"select": "angular", "count": layers}, "seed": seed}


def _curing_found(rows: Sequence[Row]) -> list[str]:
    dense, most = rows[0], rows[-1]
    return [
        f"Factoring {most['layers']} layers without healing multiplies the perplexity by "
        f"{ratio(most, dense):.2f} on WikiText-2 and by {ratio(most, dense, 'c4'):.2f} on C4, and "
        f"leaves {most['model ratio']:.1%} of the model's parameters.",
        _verdict(
            ratio(most, dense) < 1.5,
            f"that factoring {most['layers']} layers costs little before healing",
        ),
    ]


# -- which rows and columns ----------------------------------------------------------------------

SELECTIONS: dict[str, Settings] = {
    "random": {"selection": "random", "scores": "weight"},
    "weight magnitude": {"selection": "norm", "scores": "weight"},
    "WANDA": {"selection": "norm", "scores": "wanda"},
    "DEIM": {"selection": "deim", "scores": "wanda"},
    "QDEIM": {"selection": "qdeim", "scores": "wanda"},
    "leverage": {"selection": "leverage", "scores": "wanda"},
    "greedy (ours)": {"selection": "greedy", "scores": None},
}


def _selection(options: Any) -> list[Case]:
    ten = CURING | _angular(options.layers, options.seed)
    return [Case({"selection": "dense"})] + [
        _cur({"selection": name}, ten | chosen) for name, chosen in SELECTIONS.items()
    ]


def _selection_found(rows: Sequence[Row]) -> list[str]:
    dense, *others = rows
    ordered = sorted(others, key=lambda row: ratio(row, dense))
    published = [row for row in ordered if row["selection"] != "greedy (ours)"]
    return [
        "From best to worst, perplexity ÷ dense: "
        + ", ".join(f"{row['selection']} {ratio(row, dense):.2f}" for row in ordered)
        + ".",
        _verdict(published[0]["selection"] == "DEIM", "that DEIM on WANDA scores chooses best"),
        "Greedy lowers the error in the norm of the fit: under the published `C⁺ W R⁺`, of the "
        "weights alone, whatever the activations.",
    ]


# -- rank ------------------------------------------------------------------------------------------

RANKS = (16, 32, 64, 96, 128, 192, 256, 384)


def _rank(options: Any) -> list[Case]:
    ten = CURING | _angular(options.layers, options.seed)
    cases = [Case({"fit": "dense", "largest rank": None})]
    for fit in ("weight", "gram"):
        for rank in RANKS:
            chosen = ten | {"fit": fit, "rank": {"max": rank}}
            cases.append(_cur({"fit": fit, "largest rank": rank}, chosen))
    return cases


def _rank_found(rows: Sequence[Row]) -> list[str]:
    dense = rows[0]
    found = []
    for fit in ("weight", "gram"):
        within = [r for r in rows[1:] if r["fit"] == fit and ratio(r, dense) <= KEPT]
        least = min((r["largest rank"] for r in within), default=None)
        found.append(
            f"Fit `{fit}`: "
            + (
                f"the least rank that stays within {KEPT - 1:.0%} of the dense perplexity is "
                f"{least}."
                if least
                else f"none of the ranks up to {RANKS[-1]} stays within {KEPT - 1:.0%} of the "
                "dense perplexity."
            )
        )
    return found


# -- calibration text ------------------------------------------------------------------------------


def _domains(options: Any) -> list[Case]:
    return [Case({"calibrated on": "dense"})] + [
        _cur({"calibrated on": name}, EVERYTHING | {"seed": options.seed}, name) for name in DOMAINS
    ]


def _domains_found(rows: Sequence[Row]) -> list[str]:
    _, *others = rows
    own = {row["calibrated on"]: row for row in others}
    best = [
        name
        for name in DOMAINS
        if min(others, key=lambda r: r[f"perplexity {name}"])["calibrated on"] == name
    ]
    worst = max(
        row[f"perplexity {name}"] / own[name][f"perplexity {name}"]
        for name in DOMAINS
        for row in others
    )
    return [
        f"{len(best)} of {len(DOMAINS)} texts are modelled best by the model calibrated on them "
        f"({', '.join(best)}).",
        f"Calibrated on another text, the perplexity is up to {worst:.2f} times that of the model "
        "calibrated on its own.",
        _verdict(worst < 1.1, "that the calibration text hardly matters"),
    ]


def _verdict(holds: bool, claim: str) -> str:
    return f"The claim {claim} {'holds' if holds else 'does **not** hold'} on this model."


def _on(*texts: str) -> Callable[[Any, Sequence[Any]], Perplexities]:
    return lambda options, cases: Perplexities(options, texts, cases)


EXPERIMENTS = {
    "curing": Experiment(
        "CURing as published, without healing: what do 2, 5 and 10 layers cost?",
        _curing,
        _on("wikitext", "c4"),
        lambda rows: draw.lollipops(rows, "layers", ("wikitext", "c4")),
        _curing_found,
    ),
    "selection": Experiment(
        "Which rows and columns: does DEIM on WANDA scores choose best?",
        _selection,
        _on("wikitext", "c4"),
        lambda rows: draw.lollipops(rows, "selection", ("wikitext", "c4")),
        _selection_found,
    ),
    "rank": Experiment(
        "How does the perplexity fall with the rank, and which rank keeps it?",
        _rank,
        _on("wikitext"),
        lambda rows: draw.ranks(rows, KEPT),
        _rank_found,
    ),
    "domains": Experiment(
        "Calibrated on one kind of text, how does the model do on the others?",
        _domains,
        _on(*DOMAINS),
        lambda rows: draw.matrix(rows, DOMAINS),
        _domains_found,
    ),
    "stat": stat.EXPERIMENT,
    "pruning": pruning.EXPERIMENT,
    "convolution": convolution.EXPERIMENT,
}
