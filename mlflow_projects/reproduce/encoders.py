"""Encoders with the head of a task, pruned case by case and measured on the validation split."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mlflow_projects.bench.quality.methods import recipe_of
from mlflow_projects.reproduce.cases import Row

__all__ = ["PADDED", "TOKENS", "Encoders", "Pruned", "padded"]

TOKENS = 128  # of a sequence, in the budget of multiply-accumulates
PADDED = 16  # samples of a batch of the published methods


@dataclass(frozen=True)
class Pruned:
    """One model of the experiment.

    Attributes:
        task: of GLUE.
        method: its name in the table; ``dense`` for the model as it is.
        macs: budget, a share of the layers' multiply-accumulates.
        stage: fields of ``IDPruningModifier``; or
        module: a module of this package with ``prune``.
    """

    task: str
    method: str
    macs: float
    stage: Mapping[str, Any] | None = None
    module: str | None = None

    @property
    def labels(self) -> Row:
        """What tells its row from the others."""
        return {"task": self.task, "method": self.method, "MACs": self.macs}


class Encoders:
    """Loads dense checkpoints, prunes each with labelled examples of the training split, and
    measures it.

    Raises:
        OSError, ValueError: checkpoints or data that are missing or do not fit, with the remedy.
    """

    def __init__(self, options: argparse.Namespace, cases: Sequence[Pruned]) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from cur_modifier.tasks import Head, find_task, task_dataset, validation_split
        from cur_modifier.tasks.heads import check_model

        names = list(dict.fromkeys(case.task for case in cases))
        tasks = {name: find_task(name) for name in names}
        if others := [n for n, task in tasks.items() if task.head is not Head.CLASSIFICATION]:
            raise ValueError(
                f"tasks {', '.join(others)}: the published methods are written for one prediction "
                "a text. Name tasks of GLUE."
            )
        if options.models is None:
            raise ValueError("models is missing: the folder of the dense checkpoints, one a task.")
        self._models = Path(options.models)
        if absent := [n for n in names if not (self._models / n / "config.json").is_file()]:
            commands = "\n".join(
                "  mlflow run mlflow_projects/finetune --env-manager local "
                f"-P task={name} -P task_data={options.data} -P output={self._models / name}"
                for name in absent
            )
            raise FileNotFoundError(
                f"{self._models} holds no dense checkpoint of {', '.join(absent)}. Make them:\n"
                f"{commands}\n"
            )
        self._tasks, self._tokenizers, self._calibration, self._validation = tasks, {}, {}, {}
        for name, task in tasks.items():
            path = str(self._models / name)
            config = AutoConfig.from_pretrained(path)
            check_model(task, config, path)
            self._tokenizers[name] = tokenizer = AutoTokenizer.from_pretrained(path)
            self._calibration[name] = task_dataset(
                name,
                tokenizer,
                options.data,
                config=config,
                samples=options.samples,
                max_length=TOKENS,
                seed=options.seed,
            )
            self._validation[name] = validation_split(task, options.data).first(options.limit)

    def measure(self, case: Pruned) -> Row:
        """The share of multiply-accumulates that is left, the task's first metric, and seconds."""
        import torch
        from transformers import AutoModelForSequenceClassification

        from cur_modifier.structure.operators import matrix_of
        from cur_modifier.tasks import measure_task
        from mlflow_projects.reproduce.sublayers import sublayers

        model = AutoModelForSequenceClassification.from_pretrained(
            self._models / case.task, dtype=torch.float32
        )
        units, costs = sublayers(model, TOKENS)
        started = time.perf_counter()
        if case.module is not None:
            prune = import_module(f"mlflow_projects.reproduce.{case.module}").prune
            prune(model, self._batches(case.task), case.macs, TOKENS)
        elif case.stage is not None:
            self._oneshot(model, case)
        seconds = time.perf_counter() - started
        counts = {
            u.consumer: matrix_of(model.get_submodule(u.consumer)).shape[1] // u.reads.shape[1]
            for u in units
        }
        validation = self._validation[case.task]
        score = measure_task(
            self._tasks[case.task], model, self._tokenizers[case.task], validation.examples
        )[0]
        return {
            "MACs left": costs.left(units, counts) / costs.total,
            "metric": score.name,
            "score": score.value,
            "stderr": score.stderr,
            "examples": len(validation.examples),
            "seconds": round(seconds, 1),
            "kept": [counts[u.consumer] for u in units],
        }

    def _oneshot(self, model: Any, case: Pruned) -> None:
        import yaml
        from llmcompressor import oneshot

        import cur_modifier  # noqa: F401 - registers the stage

        stages = {"IDPruningModifier": dict(case.stage or {})}
        data = self._calibration[case.task]
        oneshot(
            model=model,
            dataset=data,
            recipe=yaml.safe_dump(recipe_of(stages), sort_keys=False),
            processor=self._tokenizers[case.task],
            num_calibration_samples=len(data),
        )

    def _batches(self, task: str) -> list[dict[str, Any]]:
        return padded(self._calibration[task], self._tokenizers[task])


def padded(data: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Batches of samples of about one length, with their labels ``(samples,)``."""
    import torch

    rows = sorted((dict(row) for row in data), key=lambda row: len(row["input_ids"]))
    batches = []
    for start in range(0, len(rows), PADDED):
        part = rows[start : start + PADDED]
        labels = torch.tensor([row.pop("labels")[0] for row in part])
        batches.append({**tokenizer.pad(part, return_tensors="pt"), "labels": labels})
    return batches
