"""Rates, order, steps and stopping: functions of the step and a seed, so that a run that was killed
and continued is the run that was not."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch

__all__ = ["DIVERGED", "History", "Plateau", "batch_at", "split", "warmup_cosine"]


# A held-out loss this many times that before the first step is a divergence.
DIVERGED = 4.0


def warmup_cosine(step: int, *, steps: int, warmup: int) -> float:
    """Share of the learning rate at ``step`` in 1 to ``steps``.

    It rises linearly to 1 at step ``warmup`` (from 1 at once without one), then falls along half a
    cosine that would reach 0 one step after the last.
    """
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup))) / 2


def split(samples: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out: ``share`` of them, at least one, drawn by ``seed``.

    Raises:
        ValueError: nothing would be left to train on.
    """
    held_out = max(1, round(samples * share))
    if samples - held_out < 1:
        raise ValueError(
            f"{samples} calibration samples can't be split into training and validation "
            f"(validation_share {share:g} holds out {held_out}). Give more samples, or a smaller "
            "share."
        )
    order = torch.randperm(samples, generator=_generator(seed, 0)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def batch_at(step: int, *, batch_size: int, samples: int, seed: int) -> list[int]:
    """Positions in 0 to ``samples − 1`` of the samples of ``step``, which counts from 1.

    One epoch after the other, each a permutation of its own; a batch may begin in one and end in
    the next. Needs no state: any step can be the first.
    """
    first = (step - 1) * batch_size
    wanted = range(first, first + batch_size)
    epochs = {place // samples for place in wanted}
    orders = {
        epoch: torch.randperm(samples, generator=_generator(seed, epoch + 1)).tolist()
        for epoch in epochs
    }
    return [orders[place // samples][place % samples] for place in wanted]


@dataclass
class Plateau:
    """The best value seen, and whether ``patience`` values in a row have failed to beat it."""

    patience: int
    best: float = math.inf
    best_step: int = 0
    waited: int = 0

    def update(self, step: int, value: float) -> bool:
        """Take the value of ``step``; whether it is the best so far. NaN never is."""
        if value < self.best:
            self.best, self.best_step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience


@dataclass
class History:
    """What a run has seen: training as ``(step, loss, learning rate)``, validation as ``(step,
    loss, the part of it that the layers make)``."""

    train: list[tuple[int, float, float]] = field(default_factory=list)
    validation: list[tuple[int, float, float]] = field(default_factory=list)

    def stagnated(self, gain: float) -> bool:
        """Whether the second half of the run lowered the best validation loss by less than the
        share ``gain``. A run of fewer than four validations has not had the time to."""
        if len(self.validation) < 4:
            return False
        half = self.validation[-1][0] / 2
        early = min(loss for step, loss, _ in self.validation if step <= half)
        return min(loss for _, loss, _ in self.validation) > (1 - gain) * early


def _generator(seed: int, stream: int) -> torch.Generator:
    """A generator of its own for each use of a seed; the global one is left alone."""
    text = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(text[:7], "big"))
