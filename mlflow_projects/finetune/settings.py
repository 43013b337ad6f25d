"""How each task is trained by default: sensible for MiniLM, in minutes on two cores."""

from __future__ import annotations

from dataclasses import dataclass

from cur_modifier.tasks import Head, Task

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
_EPOCHS = {"sst2": 2, "mrpc": 5, "stsb": 4, "qnli": 4, "mnli": 1, "qqp": 1}


def defaults(task: Task) -> Settings:
    """The settings of a task."""
    if task.head is Head.ANSWERS:
        return Settings(epochs=3, learning_rate=1e-4, max_length=384)
    return Settings(epochs=_EPOCHS.get(task.name, 3), learning_rate=1e-4, max_length=128)
