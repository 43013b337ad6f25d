"""What an experiment is: a question, cases to measure, a figure and findings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Case", "Experiment", "Harness", "Row", "Settings"]

Row = dict[str, Any]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One compression; without stages, the dense model.

    Attributes:
        labels: what tells this row from the others, as columns.
        stages: modifiers of a recipe, one after another: fields by class name.
        calibrate: the text it calibrates on.
        with_sizes: whether the row also has the ratio of the layers, and megabytes.
        may_fail: whether a recipe that is refused makes a row without figures.
    """

    labels: Row
    stages: Mapping[str, Any] = field(default_factory=dict)
    calibrate: str = "wikitext"
    with_sizes: bool = False
    may_fail: bool = False


class Harness(Protocol):
    """Measures cases."""

    def measure(self, case: Any) -> Row:
        """The figures of one case."""
        ...


def _as_they_are(rows: Sequence[Row]) -> Sequence[Row]:
    return rows


def _perplexities(row: Row) -> dict[str, float]:
    given = {key: value for key, value in row.items() if key.startswith("perplexity ")}
    return {
        key.replace("perplexity ", "perplexity/"): float(value)
        for key, value in given.items()
        if value is not None
    }


@dataclass(frozen=True)
class Experiment:
    """One question and its answer.

    Attributes:
        question: in one line, for the head of its section.
        cases: of the command's options.
        harness: of the options and cases; it checks all that it needs.
        figure: drawn from the rows.
        findings: sentences that the rows bear out, for or against the claim.
        settings: options that the figures depend on, in the order of the command.
        chooses: options that choose the rows, and change none.
        table: the rows as the section shows them.
        metrics: of a row, for MLflow.
    """

    question: str
    cases: Callable[[Any], Sequence[Any]]
    harness: Callable[[Any, Sequence[Any]], Harness]
    figure: Callable[[Sequence[Row]], Any]
    findings: Callable[[Sequence[Row]], list[str]]
    settings: tuple[str, ...] = ("model", "samples", "windows", "sequence_length", "layers", "seed")
    chooses: tuple[str, ...] = ()
    table: Callable[[Sequence[Row]], Sequence[Row]] = _as_they_are
    metrics: Callable[[Row], dict[str, float]] = _perplexities
