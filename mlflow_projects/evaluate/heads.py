"""Tasks of models with a head: GLUE for classification, SQuAD for question answering."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cur_modifier.tasks import TASKS, Task, find_task, measure_task, validation_split
from cur_modifier.tasks.heads import architecture, check_model, head_of
from mlflow_projects.evaluate.tasks import BadInputError, Figure

# In the class names of models that lm-eval can run.
_GENERATIVE = ("CausalLM", "LMHead", "ConditionalGeneration")


def has_task_head(config: Any, names: Iterable[str]) -> bool:
    """Whether tasks are measured by a model's head, and not by lm-eval.

    lm-eval has prompts for some of the same tasks. Those are for causal language models.
    """
    if head_of(config) is not None:
        return True
    generates = any(part in architecture(config) for part in _GENERATIVE)
    return not generates and any(name in TASKS for name in names)


class HeadTasks:
    """Those that ``options`` ask for, with their examples at hand.

    Raises:
        BadInputError: an unknown task, a model that does not fit one, options of lm-eval, examples
            that can't be had or read.
        OSError: no folder of examples, or no file of a task in it.
    """

    def __init__(self, options: argparse.Namespace, configs: Mapping[str, Any]) -> None:
        _refuse_others(options)
        self._whole = options.split == "whole"
        try:
            tasks = [find_task(name) for name in options.tasks]
            for task in tasks:
                for name, config in configs.items():
                    check_model(task, config, name)
            self._asked = {task: self._split(task, options) for task in tasks}
        except ValueError as error:
            raise BadInputError(str(error)) from None

    def _split(self, task: Task, options: argparse.Namespace) -> Any:
        data = Path(options.task_data) if options.task_data else None
        if data is not None and not data.is_dir():
            raise FileNotFoundError(f"no folder {data} of task data.")
        return validation_split(task, data, whole=self._whole).first(options.limit)

    def ask(self, backend: Any) -> tuple[list[Figure], None]:
        """Every metric of every task; of lm-eval's results there are none."""
        return [
            Figure(
                f"{task.name}/{score.name}",
                score.value,
                score.stderr,
                f"{len(split.examples)} examples ({split.origin})",
            )
            for task, split in self._asked.items()
            for score in measure_task(
                task,
                backend.model,
                backend.tokenizer,
                split.examples,
                batch_size=backend.batch_size,
            )
        ], None


def _refuse_others(options: argparse.Namespace) -> None:
    """Raise for what has no meaning here."""
    if options.data:
        raise BadInputError(
            f"{options.model} has a head in place of the next token, so it has no perplexity on "
            f"{', '.join(options.data)}. Leave data out."
        )
    if options.backend != "transformers":
        raise BadInputError(
            f"backend {options.backend} runs no model for classification or question answering "
            "here. Leave backend out: transformers runs them."
        )
    if options.few_shot is not None:
        raise BadInputError(
            f"few_shot {options.few_shot}: a model with a head has no prompt to put examples in. "
            "Leave few_shot out."
        )
