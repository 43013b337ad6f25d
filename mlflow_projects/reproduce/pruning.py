"""Neurons and heads of a decoder: how many parameters go at what perplexity, also in 4 bits.

Removal beside the recipes `id.yaml` and `cur_healed.yaml`, and each with GPTQ behind it, as in
`prune_then_gptq.yaml` and `id_then_gptq.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlflow_projects.bench.quality.methods import BUDGET, CUR, HEALING, ID, gptq
from mlflow_projects.reproduce import draw
from mlflow_projects.reproduce.cases import Case, Experiment, Row, Settings
from mlflow_projects.reproduce.perplexities import Perplexities

__all__ = ["EXPERIMENT", "RATIOS", "UNITS"]

RATIOS = (0.9, 0.8, 0.7, 0.6)
UNITS = {"neurons": ["neurons"], "heads": ["heads"], "both": ["neurons", "heads"]}
TEXTS = ("wikitext", "c4")
GROUP, FACTORED_GROUP = 64, 32  # inputs that share a scale; factors' ranks divide by the second


def _cases(options: Any) -> list[Case]:
    made: list[tuple[Row, Settings]] = [({"method": "dense", "shapes": "", "ratio": 1.0}, {})]
    for ratio in options.budgets or RATIOS:
        for name, units in UNITS.items():
            for shapes in ("uniform", "free"):
                stage = {
                    "units": units,
                    "budget": {"ratio": ratio},
                    "shapes": shapes,
                    "served": shapes == "uniform" or name == "neurons",
                    "seed": options.seed,
                }
                labels = {"method": name, "shapes": shapes, "ratio": ratio}
                made.append((labels, {"IDPruningModifier": stage}))
        row_ids = ID | {"rank": {"ratio": ratio} | BUDGET, "seed": options.seed}
        made.append(({"method": "id", "shapes": "", "ratio": ratio}, {"CURModifier": row_ids}))
    healed = CUR | {"layers": CUR["layers"] | {"count": options.layers}, "seed": options.seed}
    labels = {"method": "cur_healed", "shapes": "", "ratio": None}
    made.append((labels, {"CURModifier": healed} | HEALING))
    return [
        Case(
            labels | {"bits": bits},
            stages if bits == 16 else _quantized(stages),
            with_sizes=True,
            may_fail=True,
        )
        for labels, stages in made
        for bits in (16, 4)
    ]


def _quantized(stages: Settings) -> Settings:
    """The stages with GPTQ behind them; ranks of factors are multiples of its groups."""
    group = FACTORED_GROUP if "CURModifier" in stages else GROUP
    if "CURModifier" in stages:
        stages = stages | {"CURModifier": stages["CURModifier"] | {"multiple_of": FACTORED_GROUP}}
    return stages | {"GPTQModifier": gptq(4, group)}


def _findings(rows: Sequence[Row]) -> list[str]:
    found = [
        "`layer ratio` is parameters after ÷ before of the decoder layers, megabytes are those of "
        "a checkpoint in bfloat16 with quantized weights at their bits."
    ]
    refused = [row for row in rows if row["perplexity wikitext"] is None]
    if refused:
        found.append(
            "Without figures, since no selection meets the budget or no reader takes the shapes: "
            + "; ".join(f"{_name(row)}{_at(row)}, {row['bits']} bits" for row in refused)
            + "."
        )
    ratios = sorted({row["ratio"] for row in rows if row["ratio"]} - {1.0}, reverse=True)
    for bits in (16, 4):
        for ratio in ratios:
            own = [
                row
                for row in rows
                if (row["ratio"], row["bits"]) == (ratio, bits)
                and row["perplexity wikitext"] is not None
            ]
            removed = [row for row in own if row["method"] in UNITS]
            other = next((row for row in own if row["method"] == "id"), None)
            if not removed:
                continue
            best = min(removed, key=lambda row: row["perplexity wikitext"])
            against = "" if other is None else f", `id` {other['perplexity wikitext']:.1f}"
            found.append(
                f"At {ratio:g} in {bits} bits: {_name(best)} is the best removal with "
                f"{best['perplexity wikitext']:.1f}{against}."
            )
    return found


def _at(row: Row) -> str:
    return f" at {row['ratio']:g}" if row["ratio"] else ""


def _name(row: Row) -> str:
    return f"{row['method']}, {row['shapes']}" if row["shapes"] else str(row["method"])


EXPERIMENT = Experiment(
    "Neurons and heads of a decoder: which perplexity is left at which size, and in 4 bits?",
    _cases,
    lambda options, cases: Perplexities(options, TEXTS, cases),
    lambda rows: draw.sizes([row | {"name": _name(row)} for row in rows]),
    _findings,
    chooses=("budgets",),
)
