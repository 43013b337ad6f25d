"""What a ``CURModifier`` tells the terminal and MLflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from loguru import logger
from torch import nn

from cur_modifier.linalg import weighted_spectrum
from cur_modifier.modifiers.journal import Journal
from cur_modifier.modifiers.report import ModuleRecord, format_table, summarize
from cur_modifier.tracking.figures import layer_costs, rank_map, relative_error_map, spectra

__all__ = ["FactoringJournal"]

# A spectrum costs an eigvalsh of the short side; above this only an accelerator does it in passing.
SPECTRUM_SIDE = 2048


class FactoringJournal(Journal):
    """The records of one stage, by module, beside its run.

    Args:
        model: the dense model, before anything is swapped in.
        enabled: as for :class:`Journal`.
    """

    def __init__(self, model: nn.Module, *, enabled: bool) -> None:
        super().__init__(model, enabled=enabled, kind="cur")
        self.records: dict[str, ModuleRecord] = {}
        self._spectra: dict[str, tuple[list[float], int]] = {}

    def planned(
        self, by: str | list[int], costs: Sequence[float] | None, chosen: Sequence[int]
    ) -> None:
        """Log by layer what decided: angular distances, or the expected growth of the loss."""
        if costs is None:
            return
        metric = "expected_loss_growth_nats" if by == "sensitivity" else "angular_distance"
        self.figure(lambda: layer_costs(metric, costs, list(chosen)), f"{metric}.png")
        for index, cost in enumerate(costs):
            if math.isfinite(cost):
                self._tracker.log_metrics({metric: cost}, step=index)

    def fitted(
        self,
        name: str,
        records: Sequence[ModuleRecord],
        W: torch.Tensor,
        mean_square: torch.Tensor | None,
    ) -> None:
        """Log what was fitted at once: one module, or several that share a skeleton.

        Args:
            W: their dense weight, stacked.
        """
        for record in records:
            assert record.relative_error is not None and record.seconds is not None
            holder = record.shared_skeleton
            logger.info(
                f"{record.name}: {record.out_features}x{record.in_features} as {record.form} of "
                f"rank {record.rank}{f' on the skeleton of {holder}' if holder else ''}, relative "
                f"error {record.relative_error:.4f}, {record.seconds:.2f} s"
            )
            done = sum(r.seconds is not None for r in self.records.values())
            self._tracker.log_metrics(
                {"relative_error": record.relative_error, "module_seconds": record.seconds},
                step=done,
            )
        if not self.draws:
            return
        if min(W.shape) <= SPECTRUM_SIDE or W.device.type != "cpu":
            rank = records[0].rank
            assert rank is not None
            self._spectra[name] = (weighted_spectrum(W, mean_square).tolist(), rank)

    def finish(self, model: nn.Module) -> None:
        """Print the table, log the totals, the table and the figures, and close the run."""
        self.losses.close()
        for name, loss in self.losses.by_module.items():
            owner, _, factor = name.removesuffix(".").rpartition(".")
            if owner in self.records:
                self.records[owner].losses[factor] = loss
        records = list(self.records.values())
        totals = summarize(records, self.parameters_before)
        table = format_table(records, totals)
        logger.info(f"CURModifier\n{table}")
        ranks = {r.name: r.rank for r in records if r.rank is not None}
        errors = {r.name: r.relative_error for r in records if r.relative_error is not None}
        figures: dict[str, Callable[[], Any]] = {}
        if ranks:
            figures["rank_map.png"] = lambda: rank_map(ranks)
        if errors:
            figures["relative_error_map.png"] = lambda: relative_error_map(errors)
        if self._spectra:
            figures["spectra.png"] = lambda: spectra(self._spectra)
        rows = [record.row() for record in records]
        self.close(model, table, totals.metrics(), rows, figures)
