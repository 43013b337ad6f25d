"""Whether a model fits a task: its head, and what its labels are called."""

from __future__ import annotations

from typing import Any

from cur_modifier.tasks.table import Head, Task

__all__ = ["architecture", "check_model", "head_of", "label_order"]


def architecture(config: Any) -> str:
    """The class that a checkpoint was saved from, empty where its config does not say."""
    return next(iter(config.architectures or ()), "")


def head_of(config: Any) -> Head | None:
    """The head of a checkpoint; None for a causal language model, or a model without a head."""
    name = architecture(config)
    # XLM and FlauBERT end in ForQuestionAnsweringSimple.
    return next((head for head in Head if head in name), None)


def check_model(task: Task, config: Any, name: str) -> None:
    """Make sure that a checkpoint has the head and the labels of a task.

    Args:
        name: what the user calls the model, for the message.

    Raises:
        ValueError: another head or none, a number of labels or names of them that do not fit.
    """
    if head_of(config) is not task.head:
        held = architecture(config) or "a model without architectures in config.json"
        raise ValueError(
            f"{name} is {held}, and {task.name} needs a class ...{task.head}. Fine-tune a model "
            f"with mlflow_projects/finetune (task={task.name}), or name a task that fits its head."
        )
    if task.head is not Head.CLASSIFICATION:
        return
    if config.num_labels != task.outputs:
        wanted = f"{task.outputs} ({', '.join(task.labels) or 'a score'})"
        raise ValueError(
            f"{name} has {config.num_labels} labels ({', '.join(config.id2label.values())}), and "
            f"{task.name} has {wanted}. Give a model that was trained on {task.name}."
        )
    label_order(task, config, name)


def label_order(task: Task, config: Any, name: str = "the model") -> list[int]:
    """The model's number of each label of a task, in the task's order.

    Models number the labels of MNLI in several ways, and say how in ``id2label``. Where that holds
    transformers' default (LABEL_0, LABEL_1) the task's order is taken.

    Raises:
        ValueError: the names are others.
    """
    if task.is_regression:
        return [0]
    given = {_plain(label): int(number) for number, label in config.id2label.items()}
    wanted = [_plain(label) for label in task.labels]
    if set(given) == set(wanted):
        return [given[label] for label in wanted]
    if set(given) == {f"label{number}" for number in range(len(wanted))}:
        return list(range(len(wanted)))
    raise ValueError(
        f"{name} calls its labels {', '.join(config.id2label.values())}, so which is which of "
        f"{', '.join(task.labels)} can't be known. Write those names into id2label and label2id "
        "of its config.json."
    )


def _plain(label: str) -> str:
    return "".join(letter for letter in label.lower() if letter.isalnum())
