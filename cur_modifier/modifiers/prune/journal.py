"""What an ``IDPruningModifier`` tells the terminal and MLflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loguru import logger
from torch import nn

from cur_modifier.modifiers.journal import Journal
from cur_modifier.modifiers.prune.report import UnitRecord, format_table, totals
from cur_modifier.modifiers.report import parameter_count
from cur_modifier.tracking.figures import kept_units

__all__ = ["PruningJournal"]


class PruningJournal(Journal):
    """The records of one stage, by consumer, beside its run.

    Args:
        model: before anything is removed.
        enabled: as for :class:`Journal`.
    """

    def __init__(self, model: nn.Module, *, enabled: bool) -> None:
        super().__init__(model, enabled=enabled, kind="prune")
        self.records: dict[str, UnitRecord] = {}

    def removed(self, record: UnitRecord) -> None:
        """Log what was done to the units of one kind in a layer."""
        self.records[record.name] = record
        assert record.seconds is not None
        metrics = {"module_seconds": record.seconds}
        missed = ""
        if record.relative_error is not None:  # known where activations are
            metrics["relative_error"] = record.relative_error
            missed = f", relative error {record.relative_error:.4f}"
        logger.info(
            f"{record.name}: {record.after} of {record.before} {record.kind} kept{missed}, "
            f"{record.seconds:.2f} s"
        )
        done = sum(record.seconds is not None for record in self.records.values())
        self.tracker.log_metrics(metrics, step=done)

    def finish(self, model: nn.Module, counted: str, before: int, after: int) -> None:
        """Print the table, log the totals, the table and the figures, and close the run.

        Args:
            counted: what the budget counts.
            before, after: how much of it there was, and is.
        """
        self.losses.close()
        records = list(self.records.values())
        summed = totals(records, (before, after), (self.parameters_before, parameter_count(model)))
        table = format_table(records, summed, counted)
        logger.info(f"IDPruningModifier\n{table}")
        # A layer may have several convolutions: they are shown one after another.
        read = {r.name for r in records if r.kind == "channels"}
        order = {n: i for i, n in enumerate(n for n, _ in model.named_modules() if n in read)}
        kept = {r.name: (r.kind, order.get(r.name, r.layer), r.after / r.before) for r in records}
        figures: dict[str, Callable[[], Any]] = {}
        if kept:
            figures["kept_units.png"] = lambda: kept_units(list(kept.values()))
        self.close(model, table, summed, [r.row() for r in records], figures)
