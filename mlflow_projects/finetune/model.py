"""The model that is trained: an encoder with a new head, whose config says what its labels are."""

from __future__ import annotations

from typing import Any

from cur_modifier.tasks import Head, Task


def with_head(source: str, task: Task) -> Any:
    """The checkpoint in float32 with the head of the task, random where it has none.

    Raises:
        ValueError: transformers knows no such head for this kind of model.
    """
    import torch
    import transformers

    if task.head is Head.QUESTION_ANSWERING:
        labels: dict[str, Any] = {"num_labels": task.outputs}
    else:
        names = task.labels or ("score",)
        labels = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "regression" if task.is_regression else "single_label_classification",
        }
    config = transformers.AutoConfig.from_pretrained(source, **labels)
    try:
        return getattr(transformers, task.head.auto_class).from_pretrained(
            source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"transformers has no model {task.head} of type {config.model_type}, so {source} can't "
            f"be trained on {task.name}. Give another encoder."
        ) from None
