"""What a stage tells the terminal and MLflow while it works, kept out of the way of the work."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import yaml
from loguru import logger
from torch import nn

from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.report import Refinement, parameter_bytes, parameter_count
from cur_modifier.tracking import Page, Tracker, start_tracking
from cur_modifier.tracking.figures import refinement_curves

__all__ = ["Journal", "failing_run"]


class Journal:
    """The MLflow run of one stage, the losses that later stages log, and what lies beside the
    checkpoint.

    Args:
        model: the dense model, before anything is changed.
        enabled: whether to log to MLflow, and to draw; a store that is out of reach leaves the
            figures to the report.
        kind: of the stage, the first word of the run's name.

    Attributes:
        files: what belongs beside the checkpoint, by name; the report joins it in the end.
        complete: whether the stage has done its work.
        parameters_before: of the model.
        draws: whether figures are drawn.
        losses: of later stages, by module.
    """

    def __init__(self, model: nn.Module, *, enabled: bool, kind: str) -> None:
        self.complete = False
        self.parameters_before = parameter_count(model)
        self.draws = enabled
        self.losses = upstream.FollowerLosses()
        self._bytes_before = parameter_bytes(model)
        self._refined: list[Refinement] = []
        name = f"{kind}-{type(model).__name__}"
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

    def refined(self, layer: str, index: int, refinement: Refinement) -> None:
        """Log what training a layer did."""
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
        self.losses.close()
        self._tracker.finish(error=error)

    def close(
        self,
        model: nn.Module,
        table: str,
        metrics: Mapping[str, float],
        rows: Sequence[Mapping[str, Any]],
        figures: Mapping[str, Callable[[], Any]],
    ) -> None:
        """Log the totals, the table and the figures, and close the run.

        Args:
            table: as it is printed.
            metrics: totals of the stage.
            rows: one a module, or layer, for ``layers.csv``.
            figures: what draws each of them, by the artifact's name.
        """
        tracker = self._tracker
        tracker.log_metrics(dict(metrics) | self._resources(model))
        tracker.log_table([dict(row) for row in rows], "layers.csv")
        tracker.log_text(table + "\n", "summary.txt")
        for artifact, draw in figures.items():
            self.figure(draw, artifact)
        if self._refined:
            curves = [refinement.train for refinement in self._refined]
            self.figure(lambda: refinement_curves(curves), "refinement.png")
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

    def figure(self, draw: Callable[[], Any], artifact: str) -> None:
        """Draw and log a figure, where figures are drawn."""
        if not self.draws:
            return
        with _optional(artifact):
            self._tracker.log_figure(draw(), artifact)


@contextmanager
def failing_run(stage: Any) -> Iterator[None]:
    """Mark the run of a stage as failed, with its error, on the way out of one of its own steps.

    Args:
        stage: which keeps its journal in ``_journal`` while its run is open.
    """
    try:
        yield
    except BaseException as error:
        if stage._journal is not None:
            stage._journal.fail(error)
            stage._journal = None
        raise


@contextmanager
def _optional(artifact: str) -> Iterator[None]:
    """No drawing is worth hours of compression."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{artifact} could not be drawn and is left out: {error!r}")
