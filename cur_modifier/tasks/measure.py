"""A model's metrics on the examples of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cur_modifier.tasks.answers import best_answers
from cur_modifier.tasks.encode import encode_examples, longest_input, windows
from cur_modifier.tasks.heads import check_model, label_order
from cur_modifier.tasks.predict import predict
from cur_modifier.tasks.scores import Score, score_answers, score_labels
from cur_modifier.tasks.table import Head, Task

__all__ = ["WINDOW_LENGTH", "WINDOW_STRIDE", "measure_task"]

WINDOW_LENGTH = 384  # tokens of a window of SQuAD, as in the reference of BERT
WINDOW_STRIDE = 128  # that neighbouring windows share


def measure_task(
    task: Task, model: Any, tokenizer: Any, examples: Sequence[Any], *, batch_size: int = 32
) -> list[Score]:
    """The task's metrics of a model with its head, e.g. of ``validation_split(task).examples``.

    Texts are cut at the longest input of the model; contexts of SQuAD are read whole, in windows.

    Raises:
        ValueError: the model does not fit the task (:func:`check_model`), or its outputs are not
            finite.
    """
    check_model(task, model.config, model.config.name_or_path or "the model")
    longest = longest_input(tokenizer, model.config)
    if task.head is Head.QUESTION_ANSWERING:
        parts = windows(
            examples,
            tokenizer,
            max_length=min(WINDOW_LENGTH, longest),
            stride=min(WINDOW_STRIDE, longest // 4),
        )
        logits = predict(
            model,
            tokenizer,
            [part.inputs for part in parts],
            outputs=("start_logits", "end_logits"),
            batch_size=batch_size,
            description=task.name,
        )
        found = best_answers(examples, parts, logits, unanswerable=task.unanswerable)
        return score_answers(examples, found)
    rows = predict(
        model,
        tokenizer,
        encode_examples(examples, tokenizer, longest),
        outputs=("logits",),
        batch_size=batch_size,
        description=task.name,
    )
    order = label_order(task, model.config)
    ordered = [row[order] for (row,) in rows]
    predicted = [float(row[0]) if task.is_regression else int(row.argmax()) for row in ordered]
    return score_labels(task, predicted, [example.label for example in examples])
