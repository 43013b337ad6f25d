"""STAT's claim on encoders: half of the multiply-accumulates go for less than 1 % of accuracy.

MiniLM, fine-tuned on tasks of GLUE, pruned without training by our stage and by what was published
before and after it: as settings of our stage where that is faithful, else by a module of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlflow_projects.reproduce import draw
from mlflow_projects.reproduce.cases import Experiment, Row, Settings
from mlflow_projects.reproduce.encoders import TOKENS, Encoders, Pruned

__all__ = ["BUDGETS", "EXPERIMENT", "METHODS", "OURS", "PLAIN"]

BUDGETS = (0.7, 0.5, 0.35, 0.2)
OURS, PLAIN = "ours", "plain ID"
CLAIM, NEAR, FAR = 1.0, 1.5, 3.0  # points

_STAGE: Settings = {
    "units": ["neurons", "heads"],
    "shapes": "free",
    "served": False,
    "multiple_of": 16,
}


def _budget(macs: float, **more: Any) -> Settings:
    return {"macs": macs, "sequence_length": TOKENS} | more


def _ours(macs: float) -> Settings:
    return _STAGE | {"budget": _budget(macs)}


def _uncorrected(macs: float) -> Settings:
    return _ours(macs) | {"correct": "none"}


def _plain(macs: float) -> Settings:
    """As STAT: units by their activations, the consumer absorbs the others; no metric, no budget by
    the loss, no dense model beside. Pivots are those of largest norm: heads have no single ones."""
    return _STAGE | {
        "budget": _budget(macs, by="uniform"),
        "selection": "norm",
        "fit": "gram",
        "correct": "consumers",
        "anchor": None,
    }


def _magnitude(macs: float) -> Settings:
    return _STAGE | {
        "budget": _budget(macs, by="uniform"),
        "selection": "norm",
        "fit": "weight",
        "correct": "none",
    }


# A function gives fields of the stage; a text names a module of this package.
METHODS: dict[str, Callable[[float], Settings] | str] = {
    OURS: _ours,
    "ID, not corrected": _uncorrected,
    PLAIN: _plain,
    "iterative (K-prune)": "knowledge",
    "Fisher masks, tuned": "fisher_masks",
    "magnitude": _magnitude,
}


def _cases(options: Any) -> list[Pruned]:
    found = []
    for task in options.tasks:
        found.append(Pruned(task, "dense", 1.0))
        for macs in options.budgets or BUDGETS:
            for method, how in METHODS.items():
                if callable(how):
                    found.append(Pruned(task, method, macs, stage=how(macs)))
                else:
                    found.append(Pruned(task, method, macs, module=how))
    return found


def _table(rows: Sequence[Row]) -> list[Row]:
    """A row a task and method, a column a budget: hundredths of the task's metric."""
    budgets = sorted({row["MACs"] for row in rows}, reverse=True)
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["task"], row["method"])
        line = found.setdefault(
            key,
            {"task": f"{row['task']}, {row['metric']}", "method": row["method"]}
            | dict.fromkeys(f"{budget:g}" for budget in budgets),
        )
        line[f"{row['MACs']:g}"] = f"{_points(row):.1f}"
    return list(found.values())


def _findings(rows: Sequence[Row]) -> list[str]:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    score = {(row["task"], row["method"], row["MACs"]): _points(row) for row in rows}
    dense = {task: score[task, "dense", 1.0] for task in tasks}
    found = ["Columns are budgets of multiply-accumulates; figures are hundredths of the metric."]
    errors = [100 * row["stderr"] for row in rows if row["stderr"]]
    sizes = {row["task"]: row["examples"] for row in rows}
    measured = ", ".join(f"{task} on {count}" for task, count in sizes.items())
    found.append(
        f"Validation examples: {measured}."
        + (
            f" The standard error of an accuracy is up to {max(errors):.1f} points."
            if errors
            else ""
        )
    )
    budgets = sorted({row["MACs"] for row in rows} - {1.0}, reverse=True)
    if 0.5 in budgets:
        for method in (OURS, PLAIN):
            lost = {task: dense[task] - score[task, method, 0.5] for task in tasks}
            kept = [task for task in tasks if lost[task] < CLAIM]
            found.append(
                "STAT's claim, half of the multiply-accumulates for less than 1 % of accuracy, "
                f"{_verdict(len(kept), len(tasks))} for {method}. Points lost: "
                + ", ".join(f"{lost[task]:.1f} on {task}" for task in tasks)
                + "."
            )
        near = sum(dense[task] - score[task, OURS, 0.5] <= NEAR for task in tasks)
        found.append(f"Within {NEAR} points of dense at 0.5: ours on {near} of {len(tasks)} tasks.")
    for budget in budgets:
        ahead = {}
        for task in tasks:
            others = {m: score[task, m, budget] for m in METHODS if m != OURS}
            best = max(others, key=others.__getitem__)
            ahead[task] = (score[task, OURS, budget] - others[best], best)
        least = min(lead for lead, _ in ahead.values())
        found.append(
            f"At {budget:g} ours is ahead of the best of the others by "
            + ", ".join(f"{lead:+.1f} on {task} ({best})" for task, (lead, best) in ahead.items())
            + f": {'everywhere' if least > 0 else 'not everywhere'}"
            + (f", by {FAR:g} points or more" if least >= FAR else "")
            + "."
        )
    return found


def _verdict(kept: int, tasks: int) -> str:
    if kept == tasks:
        return f"**holds** on all {tasks} tasks" if tasks > 1 else "**holds**"
    return f"does **not** hold on {tasks - kept} of {tasks} tasks"


def _points(row: Row) -> float:
    return 100 * float(row["score"])


EXPERIMENT = Experiment(
    "Encoders pruned without training: does half of the multiply-accumulates go for less than 1 % "
    "of accuracy, and who keeps most?",
    _cases,
    Encoders,
    lambda rows: draw.scores(rows, list(METHODS)),
    _findings,
    settings=("models", "samples", "limit", "seed"),
    chooses=("tasks", "budgets"),
    table=_table,
    metrics=lambda row: {f"{row['task']}/{row['metric']}": float(row["score"])},
)
