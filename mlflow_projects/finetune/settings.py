"""How each task is trained by default: sensible for MiniLM, in minutes on two cores."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from cur_modifier.tasks import Head, Task

SHORTEST_WINDOW = 32  # tokens: half of it may be the question
HELD_OUT = 10  # one group of training examples in so many chooses the checkpoint


@dataclass(frozen=True)
class Settings:
    """What the training of a task takes.

    Attributes:
        max_length: tokens of an example; of SQuAD, of a window.
        epochs: passes over the training examples, each with a validation.
        learning_rate: the highest, reached after a tenth of the steps; it falls to 0 linearly.
    """

    epochs: int
    learning_rate: float
    max_length: int
    batch_size: int = 32
    seed: int = 0


# Few examples take more passes.
_EPOCHS = {"mrpc": 5, "stsb": 4, "qnli": 4, "mnli": 1, "qqp": 1}


def chosen(task: Task, options: argparse.Namespace, longest: int) -> Settings:
    """The task's settings, but for what is given.

    Args:
        longest: tokens that the model takes.

    Raises:
        ValueError: inputs that are longer than that, or windows that are too short.
    """
    given: dict[str, Any] = {"batch_size": options.batch_size, "seed": options.seed}
    for name in ("epochs", "learning_rate", "max_length"):
        if value := getattr(options, name):
            given[name] = value
    usual = _usual(task)
    settings = replace(usual, max_length=min(usual.max_length, longest))
    settings = replace(settings, **given)
    if settings.max_length > longest:
        raise ValueError(
            f"max_length {settings.max_length} is more than the {longest} tokens that "
            f"{options.model} takes. Give at most that."
        )
    if task.head is Head.QUESTION_ANSWERING and settings.max_length < SHORTEST_WINDOW:
        raise ValueError(
            f"max_length {settings.max_length} leaves no room for a context beside the question. "
            f"Give at least {SHORTEST_WINDOW}."
        )
    return settings


def _usual(task: Task) -> Settings:
    if task.head is Head.QUESTION_ANSWERING:
        return Settings(epochs=3, learning_rate=1e-4, max_length=384)
    return Settings(epochs=_EPOCHS.get(task.name, 3), learning_rate=1e-4, max_length=128)
