"""The training loop of a healing stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from loguru import logger
from tqdm import tqdm

from cur_modifier.modifiers.heal.distill import Distillation, Moments
from cur_modifier.tracking import Tracker
from cur_modifier.training.coordinates import Coordinates
from cur_modifier.training.schedule import DIVERGED, History, Plateau, batch_at, warmup_cosine
from cur_modifier.training.state import TrainingState

__all__ = ["Loop", "LoopSettings"]


class LoopSettings(Protocol):
    """What the loop asks of the stage; ``CURHealModifier`` documents it."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    validate_every: int
    patience: int
    logits_weight: float
    checkpoint_every: int
    seed: int


class Loop:
    """The state of one training: where it is, the best so far, what it has seen."""

    def __init__(
        self,
        settings: LoopSettings,
        distillation: Distillation,
        moments: Mapping[str, Moments],
        train: Sequence[int],
        held_out: Sequence[int],
        tracker: Tracker,
    ) -> None:
        self._settings = settings
        self._distillation = distillation
        self._train = train
        self._held_out = held_out
        self._tracker = tracker
        self.coordinates = {
            name: Coordinates(value, moments[name].output, moments[name].inputs)
            for name, value in distillation.values.items()
        }
        for name, coordinates in self.coordinates.items():
            distillation.values[name] = coordinates.value
        self._optimizer = torch.optim.Adam(
            [{"params": [c.D], "unit": c.unit} for c in self.coordinates.values()],
            lr=0.0,
            betas=(0.9, 0.98),
            eps=1e-12,
        )
        self.step = 0
        self.plateau = Plateau(settings.patience)
        self.history = History()
        self.reason = "all steps done"
        self._best = {name: c.D.clone() for name, c in self.coordinates.items()}

    def train(self, checkpoint: TrainingState | None) -> None:
        """Steps until all are done, patience runs out, or the loss diverges."""
        settings = self._settings
        if not self.history.validation:
            self._validate()
        total = settings.steps
        with tqdm(total=total, initial=min(self.step, total), desc="Healing") as bar:
            while self.step < total and not self.plateau.stopped:
                self.step += 1
                loss = self._one_step()
                if not math.isfinite(loss):
                    self._diverged(f"the training loss is {loss}")
                    break
                if self.step % settings.validate_every == 0 or self.step == total:
                    value = self._validate()
                    first = self.history.validation[0][1]
                    if not value <= DIVERGED * first:
                        self._diverged(f"the validation loss is {value:.4g}, {first:.4g} before")
                        break
                if checkpoint is not None and self.step % settings.checkpoint_every == 0:
                    self._save(checkpoint)
                bar.update()
                bar.set_postfix(
                    loss=f"{loss:.4f}",
                    validation=f"{self.history.validation[-1][1]:.4f}",
                    best=f"{self.plateau.best:.4f}",
                )
            else:
                if checkpoint is not None:
                    self._save(checkpoint)
        if self.plateau.stopped:
            self.reason = f"no better in {self.plateau.waited} validations"

    def kept(self) -> dict[str, torch.Tensor]:
        """The best factors by module, float32."""
        return {name: c.at(self._best[name]) for name, c in self.coordinates.items()}

    def table(self, moments: Mapping[str, Moments]) -> list[dict[str, Any]]:
        """A row for each module."""
        rows = []
        for name, coordinates in self.coordinates.items():
            change = coordinates.at(self._best[name]) - coordinates.start
            size = float(coordinates.start.norm())
            rows.append(
                {
                    "name": name,
                    "relative_change": float(change.norm()) / size if size else 0.0,
                    "output_error_before": moments[name].error,
                    "output_error_floor": moments[name].floor,
                }
            )
        return rows

    def restore(
        self,
        tensors: Mapping[str, torch.Tensor],
        step: int,
        plateau: Plateau,
        history: History,
    ) -> None:
        """Go on from a saved state."""
        self.step, self.plateau, self.history = step, plateau, history
        for name, coordinates in self.coordinates.items():
            D = coordinates.D
            D.copy_(tensors[f"D.{name}"])
            self._best[name].copy_(tensors[f"best.{name}"])
            self._optimizer.state[D] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg.{name}"].to(D),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(D),
            }
            coordinates.push()
        for at, loss, rate in history.train:
            self._log_step(at, loss, rate)
        for at, loss, _ in history.validation:
            self._tracker.log_metrics({"healing_validation_loss": loss}, step=at)

    # -- steps ---------------------------------------------------------------------------------

    def _one_step(self) -> float:
        settings = self._settings
        share = warmup_cosine(self.step, steps=settings.steps, warmup=settings.warmup_steps)
        rate = settings.learning_rate * share
        batch = batch_at(
            self.step,
            batch_size=settings.batch_size,
            samples=len(self._train),
            seed=settings.seed,
        )
        loss = 0.0
        for place in batch:
            part = self._distillation.loss(self._train[place])
            whole = (part.layers + settings.logits_weight * part.logits) / len(batch)
            whole.backward()
            loss += float(whole.detach())
        if math.isfinite(loss):
            for coordinates in self.coordinates.values():
                coordinates.pull_gradient()
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group["unit"]
            self._optimizer.step()
            for coordinates in self.coordinates.values():
                coordinates.push()
        self.history.train.append((self.step, loss, rate))
        self._log_step(self.step, loss, rate)
        return loss

    @torch.no_grad()
    def _validate(self) -> float:
        layers = whole = 0.0
        for index in self._held_out:
            part = self._distillation.loss(index)
            layers += float(part.layers) / len(self._held_out)
            whole += self._settings.logits_weight * float(part.logits) / len(self._held_out)
        whole += layers
        self.history.validation.append((self.step, whole, layers))
        self._tracker.log_metrics({"healing_validation_loss": whole}, step=self.step)
        if self.plateau.update(self.step, whole):
            for name, coordinates in self.coordinates.items():
                self._best[name].copy_(coordinates.D)
        return whole

    def _diverged(self, what: str) -> None:
        self.reason = f"diverged at step {self.step}"
        logger.warning(
            f"healing diverged at step {self.step}: {what}. It stops, and the factors of step "
            f"{self.plateau.best_step} (validation loss {self.plateau.best:.4g}) are kept. Lower "
            f"learning_rate (now {self._settings.learning_rate:g}) or raise warmup_steps (now "
            f"{self._settings.warmup_steps})."
        )

    def _log_step(self, step: int, loss: float, rate: float) -> None:
        self._tracker.log_metrics(
            {"healing_training_loss": loss, "healing_learning_rate": rate}, step=step
        )

    def _save(self, checkpoint: TrainingState) -> None:
        tensors = {}
        for name, coordinates in self.coordinates.items():
            adam = self._optimizer.state[coordinates.D]
            tensors[f"D.{name}"] = coordinates.D
            tensors[f"exp_avg.{name}"] = adam["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = adam["exp_avg_sq"]
            tensors[f"best.{name}"] = self._best[name]
        checkpoint.save(tensors, self.step, self.plateau, self.history)
