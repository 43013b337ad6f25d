"""What a stage tells the terminal and MLflow while it works, kept out of the way of the work."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import yaml
from loguru import logger
from torch import nn

from cur_modifier.linalg import weighted_spectrum
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.report import (
    ModuleRecord,
    Refinement,
    format_table,
    parameter_bytes,
    parameter_count,
    summarize,
)
from cur_modifier.tracking import Page, Tracker, start_tracking
from cur_modifier.tracking.figures import (
    layer_costs,
    rank_map,
    refinement_curves,
    relative_error_map,
    spectra,
)

__all__ = ["Journal"]

# A spectrum costs an eigvalsh of the short side; above this only an accelerator does it in passing.
SPECTRUM_SIDE = 2048


class Journal:
    """The records of one stage, its MLflow run, and the losses that later stages log.

    Args:
        model: the dense model, before anything is swapped in.
        enabled: whether to log to MLflow, and to draw; a store that is out of reach leaves the
            figures to the report.

    Attributes:
        files: what belongs beside the checkpoint, by name; the report joins it in the end.
        complete: whether every module is factored.
    """

    def __init__(self, model: nn.Module, *, enabled: bool) -> None:
        self.records: dict[str, ModuleRecord] = {}
        self.complete = False
        self._parameters_before = parameter_count(model)
        self._bytes_before = parameter_bytes(model)
        self._spectra: dict[str, tuple[list[float], int]] = {}
        self._refined: list[Refinement] = []
        self._losses = upstream.FollowerLosses()
        name = f"cur-{type(model).__name__}"
        self._draws = enabled
        self._tracker = Page(start_tracking(enabled=enabled, run_name=name), title=name)
        recipe = upstream.recipe_as_given()
        text = yaml.safe_dump(recipe, sort_keys=False)
        self.files = {"recipe_as_given.yaml": text}
        self._tracker.log_params(recipe)
        self._tracker.log_text(text, "recipe.yaml")

    @property
    def tracker(self) -> Tracker:
        """What records the stage, for later stages that go on with its run."""
        return self._tracker

    def planned(
        self, by: str | list[int], costs: Sequence[float] | None, chosen: Sequence[int]
    ) -> None:
        """Log by layer what decided: angular distances, or the expected growth of the loss."""
        if costs is None:
            return
        metric = "expected_loss_growth_nats" if by == "sensitivity" else "angular_distance"
        self._figure(lambda: layer_costs(metric, costs, list(chosen)), f"{metric}.png")
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
        if not self._draws:
            return
        if min(W.shape) <= SPECTRUM_SIDE or W.device.type != "cpu":
            rank = records[0].rank
            assert rank is not None
            self._spectra[name] = (weighted_spectrum(W, mean_square).tolist(), rank)

    def refined(self, layer: str, index: int, refinement: Refinement) -> None:
        """Log what training a decoder layer did."""
        what = "kept" if refinement.kept else "not kept: no gain on held-out windows"
        logger.info(
            f"{layer}: refined, held-out loss {refinement.before:.3g} → {refinement.after:.3g} "
            f"({what})"
        )
        self._refined.append(refinement)
        self._tracker.log_metrics(
            {
                "refine_loss_before": refinement.before,
                "refine_loss_after": refinement.after,
            },
            step=index,
        )

    def fail(self, error: BaseException | str) -> None:
        """Close the run as failed."""
        self._losses.close()
        self._tracker.finish(error=error)

    def finish(self, model: nn.Module) -> None:
        """Print the table, log the totals, the table and the figures, and close the run."""
        self._losses.close()
        for name, loss in self._losses.by_module.items():
            owner, _, factor = name.removesuffix(".").rpartition(".")
            if owner in self.records:
                self.records[owner].losses[factor] = loss
        records = list(self.records.values())
        totals = summarize(records, self._parameters_before)
        table = format_table(records, totals)
        logger.info(f"CURModifier\n{table}")

        tracker = self._tracker
        tracker.log_metrics(totals.metrics() | self._resources(model))
        tracker.log_table([record.row() for record in records], "layers.csv")
        tracker.log_text(table + "\n", "summary.txt")
        ranks = {r.name: r.rank for r in records if r.rank is not None}
        if ranks:
            self._figure(lambda: rank_map(ranks), "rank_map.png")
        errors = {r.name: r.relative_error for r in records if r.relative_error is not None}
        if errors:
            self._figure(lambda: relative_error_map(errors), "relative_error_map.png")
        if self._spectra:
            self._figure(lambda: spectra(self._spectra), "spectra.png")
        if self._refined:
            curves = [refinement.train for refinement in self._refined]
            self._figure(lambda: refinement_curves(curves), "refinement.png")
        with _optional("report.html"):
            self.files["report.html"] = page = tracker.html()
            tracker.log_text(page, "report.html")
        tracker.finish()
        if tracker.run_id is not None:
            logger.info(f"MLflow run {tracker.run_id}: see it with `mlflow ui`")

    def _resources(self, model: nn.Module) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        metrics: dict[str, float] = {
            "bytes_model_before": self._bytes_before,
            "bytes_model_after": parameter_bytes(model),
            "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        }
        if torch.accelerator.is_available():
            metrics["peak_accelerator_bytes"] = torch.accelerator.max_memory_allocated()
        return metrics

    def _figure(self, draw: Callable[[], Any], artifact: str) -> None:
        if not self._draws:
            return
        with _optional(artifact):
            self._tracker.log_figure(draw(), artifact)


@contextmanager
def _optional(artifact: str) -> Iterator[None]:
    """No drawing is worth hours of compression."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{artifact} could not be drawn and is left out: {error!r}")
