"""Tasks of lm-eval: found before a model is loaded, asked of any backend."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cur_modifier.tasks import TASKS

_HEADS = (
    " GLUE and SQuAD need a model for classification or question answering, which "
    "mlflow_projects/finetune makes."
)


class BadInputError(ValueError):
    """What the user gave can't be evaluated; the message says why and what to do."""


@dataclass(frozen=True)
class Figure:
    """One figure of one model: ``boolq/acc`` or ``perplexity/wiki.test``."""

    name: str
    value: float
    stderr: float | None
    of: str  # what it counts: tokens, questions
    higher_is_better: bool = True


class Tasks:
    """Those that ``options`` ask for, with their questions at hand.

    Raises:
        BadInputError: a task that lm-eval does not know, questions that can't be had or read.
        OSError: no folder of questions, or none of their files in it.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import datasets
        from lm_eval.tasks import TaskManager

        from mlflow_projects.evaluate.local_tasks import cached_tasks

        self._options = options
        # Else a line for each task that local questions replace, and a bar for each that is read.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        include = None
        if options.task_data:
            try:
                include = str(cached_tasks(Path(options.task_data)))
            except ValueError as error:
                raise BadInputError(str(error)) from None
        self._manager = TaskManager(include_path=include)
        known = self._manager.task_index
        unknown = [name for name in options.tasks if name not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=4)
            raise BadInputError(
                f"lm-eval knows no task {', '.join(unknown)}"
                + (f"; near it: {', '.join(near)}." if near else ".")
                + (_HEADS if unknown[0] in TASKS else "")
            )
        try:
            self._manager.load(options.tasks)
        except Exception as error:  # of datasets, the hub's client, or the task's own code
            raise BadInputError(
                f"the questions of {', '.join(options.tasks)} can't be had: {error}. Where the hub "
                "is out of reach, task_data=FOLDER takes them from files (local_tasks.py says how)."
            ) from None

    def ask(self, backend: Any) -> tuple[list[Figure], dict[str, Any]]:
        """Every metric of every task and group, and lm-eval's own results."""
        import lm_eval

        results = lm_eval.simple_evaluate(
            model=backend.lm(),
            tasks=self._options.tasks,
            num_fewshot=self._options.few_shot,
            limit=self._options.limit,
            task_manager=self._manager,
            log_samples=False,
        )
        found = {**results["results"], **results.get("groups", {})}
        better = results.get("higher_is_better", {})
        return list(_figures(found, results["n-samples"], better)), json.loads(
            json.dumps(results, default=str)
        )


def _figures(
    results: Mapping[str, Any],
    samples: Mapping[str, Any],
    better: Mapping[str, Mapping[str, bool | None]],
) -> Iterator[Figure]:
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            suffix = "" if kind == "none" else f"-{kind}"
            count = samples.get(task, {}).get("effective")
            yield Figure(
                f"{task}/{metric}{suffix}",
                float(value),
                stderr if isinstance(stderr, int | float) else None,
                f"{count} questions" if count else "its tasks",
                better.get(task, {}).get(metric) is not False,
            )
