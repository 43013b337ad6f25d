"""Examples of a task as calibration data with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cur_modifier.tasks.encode import answer_position, encode_examples, longest_input, windows
from cur_modifier.tasks.heads import check_model, label_order
from cur_modifier.tasks.load import training_split
from cur_modifier.tasks.table import Head, Task, find_task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["labelled", "task_dataset"]


def task_dataset(
    name: str,
    tokenizer: Any,
    data: str | Path | None = None,
    *,
    config: Any = None,
    samples: int = 256,
    max_length: int = 128,
    seed: int = 0,
) -> Dataset:
    """A tokenized ``Dataset`` of training examples, ready for ``oneshot(dataset=...)``.

    It holds ``input_ids``, ``attention_mask``, what else the tokenizer gives, and what the model's
    loss needs: ``labels``, of SQuAD ``start_positions`` and ``end_positions``. A row's ``labels``
    are a list of one, since llm-compressor's default collator takes their length. Nothing is
    padded: give ``oneshot`` the tokenizer as ``processor`` and ``data_collator="padding"`` with a
    ``batch_size`` above 1.

    Args:
        name: a task of :data:`TASKS`.
        data: the folder of task data; the hub's data set where it is None or empty.
        config: the model's, which is checked and whose numbers the labels then are. Without it
            they are GLUE's.
        max_length: tokens of an example; of SQuAD, of the window that holds the answer. Never more
            than the model takes.
        seed: draws which examples.

    Raises:
        OSError: no such folder or file; a hub that can't be reached.
        ValueError: an unknown task, a model that does not fit it, a file that does not hold what
            it should, fewer examples than ``samples``.
    """
    from datasets import Dataset

    task = find_task(name)
    if config is not None:
        check_model(task, config, getattr(config, "name_or_path", "") or "the model")
    found = training_split(task, data)
    if samples > len(found.examples):
        raise ValueError(
            f"{samples} samples are more than {name} has: {len(found.examples)} ({found.origin}). "
            "Ask for fewer."
        )
    chosen = found.sample(samples, seed).examples
    length = min(max_length, longest_input(tokenizer, config))
    rows = labelled(task, chosen, tokenizer, max_length=length, config=config)
    return Dataset.from_list(
        [row | {"labels": [row["labels"]]} if "labels" in row else row for row in rows]
    )


def labelled(
    task: Task,
    examples: Sequence[Any],
    tokenizer: Any,
    *,
    max_length: int,
    config: Any = None,
    every_window: bool = False,
) -> list[dict[str, Any]]:
    """The model's inputs with what its loss needs, one row an example.

    Args:
        every_window: of SQuAD all windows of a context, also those without the answer, whose
            position is then the first token; else the one that holds it, or the first.
    """
    if task.head is Head.CLASSIFICATION:
        order = label_order(task, config) if config is not None else range(task.outputs)
        rows = encode_examples(examples, tokenizer, max_length)
        return [
            {**row, "labels": example.label if task.is_regression else order[example.label]}
            for row, example in zip(rows, examples, strict=True)
        ]
    found: dict[int, list[dict[str, Any]]] = {}
    for window in windows(examples, tokenizer, max_length=max_length, stride=max_length // 3):
        start, end = answer_position(window, examples[window.question])
        row = {**window.inputs, "start_positions": start, "end_positions": end}
        kept = found.setdefault(window.question, [])
        if every_window or not kept:
            kept.append(row)
        elif start and not kept[0]["start_positions"]:
            kept[0] = row
    return [row for kept in found.values() for row in kept]
