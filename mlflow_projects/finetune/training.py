"""The training itself, by transformers' Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from cur_modifier.tasks import Head, Task
from cur_modifier.tasks.calibration import labelled
from cur_modifier.tasks.scores import score_labels
from mlflow_projects.finetune.settings import Settings

WARM_UP = 0.1  # of all steps
DECAY = 0.01
# What Trainer calls its figures, and what they are called in MLflow.
_NAMES = {
    "loss": "finetune_training_loss",
    "learning_rate": "finetune_learning_rate",
    **{
        f"eval_{name}": f"finetune_validation_{name}"
        for name in ("loss", "accuracy", "f1", "pearson", "spearman")
    },
}


def train(
    task: Task,
    model: Any,
    tokenizer: Any,
    training: Sequence[Any],
    validation: Sequence[Any],
    settings: Settings,
    folder: Path,
) -> dict[str, float]:
    """Train ``model`` in place, and leave it at the epoch that was best on ``validation``.

    The best has the highest of the task's first metric, of SQuAD the lowest loss. Losses and
    metrics are logged to the active MLflow run as they come.

    Args:
        folder: where the checkpoints of the epochs may lie meanwhile.

    Returns:
        What is to be logged of the whole.
    """
    choice = "loss" if task.head is Head.QUESTION_ANSWERING else task.scores[0]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".finetune-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            warmup_steps=WARM_UP,
            weight_decay=DECAY,
            seed=settings.seed,
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model=choice,
            greater_is_better=choice != "loss",
            logging_first_step=True,
            logging_steps=10,
            report_to="none",  # our own names, in the run that is active
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model,
            arguments,
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=_rows(task, model, tokenizer, training, settings),
            eval_dataset=_rows(task, model, tokenizer, validation, settings),
            compute_metrics=None if task.head is Head.QUESTION_ANSWERING else _metrics(task),
            callbacks=[_ToMLflow()],
        )
        seconds = trainer.train().metrics["train_runtime"]
    state = trainer.state
    return {
        "finetune_seconds": seconds,
        "finetune_steps": float(state.global_step),
        "finetune_best_step": float(state.best_global_step or state.global_step),
    }


def _rows(
    task: Task, model: Any, tokenizer: Any, examples: Sequence[Any], settings: Settings
) -> list[dict[str, Any]]:
    return labelled(
        task,
        examples,
        tokenizer,
        max_length=settings.max_length,
        config=model.config,
        every_window=True,
    )


def _metrics(task: Task) -> Any:
    def compute(found: Any) -> dict[str, float]:
        rows = np.asarray(found.predictions)
        predicted = rows[:, 0] if task.is_regression else rows.argmax(-1)
        scores = score_labels(task, predicted, found.label_ids.reshape(-1))
        return {score.name: score.value for score in scores}

    return compute


class _ToMLflow(TrainerCallback):
    """Logs what Trainer logs, by our names."""

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        import mlflow

        for name, value in (logs or {}).items():
            if name in _NAMES:
                mlflow.log_metric(_NAMES[name], value, step=state.global_step)
