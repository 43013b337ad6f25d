"""The training loop: the best is kept, and a continued run is the same run."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.heal.distill import Loss, Moments
from cur_modifier.modifiers.heal.loop import Loop
from cur_modifier.training.state import TrainingState


class Quadratic:
    """A distillation of one factor whose loss is its squared distance from a target."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        start, self.target = torch.randn(2, 3, 4, generator=generator)
        self.values = {"q": start}
        self.broken_from = math.inf
        self.calls = 0

    def loss(self, index: int) -> Loss:
        self.calls += 1
        distance = (self.values["q"] - self.target).square().sum()
        if self.calls > self.broken_from:
            distance = distance * torch.nan
        return Loss(distance, torch.zeros(()))


SETTINGS: dict[str, Any] = {
    "steps": 12,
    "batch_size": 2,
    "learning_rate": 0.1,
    "warmup_steps": 2,
    "validate_every": 4,
    "patience": 9,
    "logits_weight": 0.0,
    "checkpoint_every": 3,
    "seed": 0,
}
MOMENTS = {"q": Moments(torch.eye(4), None, error=0.5, floor=0.125)}


def loop(tracker: Any, distillation: Any = None, **fields: Any) -> Loop:
    settings = SimpleNamespace(**SETTINGS | fields)
    return Loop(settings, distillation or Quadratic(), MOMENTS, [0, 1, 2], [3], tracker)


def test_the_loss_falls_and_the_best_is_kept(tracker: Any) -> None:
    run = loop(tracker)
    before = run.kept()["q"]
    run.train(None)
    assert run.step == 12 and run.reason == "all steps done"
    steps = [step for step, _, _ in run.history.validation]
    losses = [loss for _, loss, _ in run.history.validation]
    assert steps == [0, 4, 8, 12] and losses == sorted(losses, reverse=True)
    assert run.plateau.best == losses[-1] < 0.9 * losses[0]
    assert not torch.equal(run.kept()["q"], before)
    [row] = run.table(MOMENTS)
    assert row["name"] == "q" and row["relative_change"] > 0
    assert (row["output_error_before"], row["output_error_floor"]) == (0.5, 0.125)


def test_patience_runs_out(tracker: Any) -> None:
    distillation = Quadratic()
    distillation.target = distillation.values["q"].clone()  # no step can be better
    run = loop(tracker, distillation, patience=2, validate_every=1)
    run.train(None)
    assert run.step == 2 and run.reason == "no better in 2 validations"
    assert torch.equal(run.kept()["q"], distillation.target)


def test_a_broken_loss_stops_and_keeps_the_best(tracker: Any, logged: list[str]) -> None:
    distillation = Quadratic()
    distillation.broken_from = 4
    run = loop(tracker, distillation)
    start = run.kept()["q"]
    run.train(None)
    assert run.reason == "diverged at step 2"
    assert torch.equal(run.kept()["q"], start)
    assert bool(torch.isfinite(distillation.values["q"]).all())  # the bad step is not taken
    [warning] = [m for m in logged if "healing diverged at step 2" in m]
    assert "the training loss is nan" in warning and "Lower learning_rate (now 0.1)" in warning


def test_a_loss_that_grows_stops_too(tracker: Any, logged: list[str]) -> None:
    run = loop(tracker, learning_rate=1e3, warmup_steps=0)
    run.train(None)
    assert run.reason == "diverged at step 4" and run.plateau.best_step == 0
    assert any("the validation loss is" in m for m in logged)


@pytest.mark.parametrize("killed", [3, 6, 9])
def test_a_run_that_was_killed_and_continued_is_the_run_that_was_not(
    tracker: Any, tmp_path: Path, killed: int
) -> None:
    whole = loop(tracker)
    whole.train(None)

    first = loop(tracker)
    checkpoint = TrainingState(tmp_path, {})
    save = first._save

    def then_die(state: TrainingState) -> None:
        save(state)
        if first.step == killed:
            raise KeyboardInterrupt

    first._save = then_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train(checkpoint)
    second = loop(tracker)
    saved = checkpoint.load()
    assert saved is not None
    second.restore(*saved)
    assert second.step == killed
    second.train(checkpoint)
    assert second.history == whole.history and second.plateau == whole.plateau
    assert torch.equal(second.kept()["q"], whole.kept()["q"])


def test_steps_and_validations_are_logged_again_after_a_restart(
    tracker: Any, tmp_path: Path
) -> None:
    checkpoint = TrainingState(tmp_path, {})
    loop(tracker, steps=4).train(checkpoint)
    told = list(tracker.metrics)
    tracker.metrics.clear()
    saved = checkpoint.load()
    assert saved is not None
    loop(tracker).restore(*saved)
    key = str
    assert sorted(tracker.metrics, key=key) == sorted(told, key=key)
