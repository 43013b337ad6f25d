"""Perplexity on texts and accuracy on tasks of one model, logged with the model's own run.

    mlflow run mlflow_projects/evaluate -P model=$PWD/out -P data=$PWD/wiki.test.raw \
        -P tasks=boolq,piqa -P task_data=$PWD/zeroshot --env-manager local

MODEL is a directory, a hub name, `smollm2` or `minilm`; DATA names texts, comma-separated (files,
folders or hub names). TASKS of a causal language model are lm-eval's. Those
of a model for classification or question answering are of GLUE (sst2, mrpc, qnli, stsb, mnli, qqp)
or SQuAD (squad, squad_v2). Either comes from the hub, or from local files: TASK_DATA, laid out as
local_tasks.py and cur_modifier/tasks/files.py say. BACKEND is `transformers`, `vllm` (which starts
a server and ends it) or the URL of a server that serves the model. BASELINE is a second model, the
dense one usually, measured in the same run. A checkpoint that `compress` or `finetune` registered
gets the figures too: its logged model, and the run that made it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from cur_modifier.compress import model_source
from cur_modifier.tasks import find_task
from mlflow_projects.arguments import elsewhere, text_name
from mlflow_projects.evaluate.heads import HeadTasks, has_task_head
from mlflow_projects.evaluate.options import parse
from mlflow_projects.evaluate.report import as_csv, as_table, log
from mlflow_projects.evaluate.tasks import BadInputError, Figure, Tasks

PROJECT = Path(__file__).resolve().parent
CAUSAL = "AutoModelForCausalLM"
TASK_LENGTH = 2048  # tokens of a prompt that tasks may need


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, log, print."""
    options = parse(__doc__, arguments)
    from mlflow_projects.evaluate.backends import BackendError

    try:
        evaluate(options)
    except (BackendError, BadInputError) as error:
        sys.exit(f"evaluate: {error}")


def evaluate(options: argparse.Namespace) -> None:
    """Measure all figures of the model, and of the baseline, and log them."""
    import mlflow

    from mlflow_projects.registry import registered

    sources = {name: _source(name) for name in _models(options)}
    tasks, auto_class = _tasks(options, sources)
    documents = _documents(options)
    texts = _windows(documents, sources[options.model], options)
    if options.baseline:
        _check_tokens(options, texts, _windows(documents, sources[options.baseline], options))
    _check_backend(options)

    with mlflow.start_run() as run:
        model = registered(sources[options.model])
        if model is not None:
            mlflow.set_tags(
                {"mlflow.parentRunId": model.source_run_id, "evaluated_model": model.model_id}
            )
        figures: dict[str, list[Figure]] = {}
        for name, source in sources.items():
            figures[name], raw = _measured(source, auto_class, texts, tasks, options)
            if raw is not None:
                mlflow.log_dict(raw, f"lm_eval-{_role(name, options)}.json")
            log(figures[name], _role(name, options), model)
        mlflow.log_text(as_csv(figures), "figures.csv")
        if options.baseline:
            from mlflow_projects.figures import before_after

            mlflow.log_figure(before_after(*figures.values()), "before_after.png")
        print(as_table(figures))
        print(f"MLflow run {run.info.run_id}" + (f", model {model.model_id}" if model else ""))


def _measured(
    source: str,
    auto_class: str,
    texts: Mapping[str, Any],
    tasks: Tasks | HeadTasks | None,
    options: argparse.Namespace,
) -> tuple[list[Figure], dict[str, Any] | None]:
    """All figures of one model, with lm-eval's own results. The model is gone afterwards."""
    with _backend(options, source, auto_class) as backend:
        figures = list(_perplexities(backend, texts, options))
        if tasks is None:
            return figures, None
        found, raw = tasks.ask(backend)
        return figures + found, raw


def _models(options: argparse.Namespace) -> list[str]:
    """The baseline comes last: the figures that were asked for are there if it fails."""
    return [options.model] + ([options.baseline] if options.baseline else [])


def _role(name: str, options: argparse.Namespace) -> str:
    return "model" if name == options.model else "baseline"


def _source(name: str) -> str:
    try:
        return model_source(name)
    except FileNotFoundError as error:
        raise BadInputError(f"{error}{elsewhere(name, PROJECT)}") from None


def _documents(options: argparse.Namespace) -> dict[str, list[str]]:
    """The documents of each text by its name."""
    from cur_modifier.data import read_documents

    documents: dict[str, list[str]] = {}
    for text in options.data:
        name = text_name(text)
        if name in documents:
            raise BadInputError(f"two texts are called {name}: their figures would share one name.")
        try:
            documents[name] = read_documents(text)
        except (OSError, ValueError) as error:
            raise BadInputError(f"{error}{elsewhere(text, PROJECT)}") from None
    return documents


def _windows(
    documents: Mapping[str, list[str]], source: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Windows of token ids by the name of their text."""
    from transformers import AutoTokenizer

    from cur_modifier.data import token_windows

    if not documents:
        return {}
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = {}
    for name, found in documents.items():
        try:
            windows[name] = token_windows(
                found,
                tokenizer,
                windows=options.windows,
                sequence_length=options.sequence_length,
                stride=options.stride,
            )
        except ValueError as error:
            raise BadInputError(f"{name}: {error}") from None
    return windows


def _check_tokens(
    options: argparse.Namespace, own: Mapping[str, Any], baseline: Mapping[str, Any]
) -> None:
    """Raise where perplexities would be of other tokens."""
    for name, windows in own.items():
        if not windows.equal(baseline[name]):
            raise BadInputError(
                f"the tokenizers of {options.model} and {options.baseline} cut {name} into other "
                "tokens, so their perplexities would not compare. Give the dense model that was "
                "compressed as baseline, or tasks alone."
            )


def _tasks(
    options: argparse.Namespace, sources: Mapping[str, str]
) -> tuple[Tasks | HeadTasks | None, str]:
    """The tasks, and the class of transformers that loads a model for them."""
    from transformers import AutoConfig

    if not options.tasks:
        return None, CAUSAL
    try:
        configs = {name: AutoConfig.from_pretrained(source) for name, source in sources.items()}
    except (OSError, ValueError) as error:
        raise BadInputError(str(error)) from None
    try:
        if not has_task_head(configs[options.model], options.tasks):
            return Tasks(options), CAUSAL
        return HeadTasks(options, configs), find_task(options.tasks[0]).head.auto_class
    except OSError as error:
        raise BadInputError(f"{error}{elsewhere(options.task_data, PROJECT)}") from None


def _perplexities(
    backend: Any, texts: Mapping[str, Any], options: argparse.Namespace
) -> Iterator[Figure]:
    for name, windows in texts.items():
        found = backend.perplexity(windows, options.stride)
        of = f"{found.tokens} tokens"
        yield Figure(f"perplexity/{name}", found.perplexity, None, of, higher_is_better=False)


def _check_backend(options: argparse.Namespace) -> None:
    """Raise where a server could not be started."""
    from mlflow_projects.evaluate.backends import BackendError
    from tools.vllm_server import ServerError, vllm_program

    if options.backend == "vllm":
        try:
            vllm_program()
        except ServerError as error:
            raise BackendError(f"{error} CUR_SERVE_PYTHON names its Python.") from None


@contextmanager
def _backend(options: argparse.Namespace, source: str, auto_class: str) -> Iterator[Any]:
    from mlflow_projects.evaluate.backends import transformers_backend, url_backend, vllm_backend

    with ExitStack() as stack:
        if options.backend == "transformers":
            chosen = transformers_backend(source, options.dtype, options.batch_size, auto_class)
        elif options.backend == "vllm":
            longest = max(options.sequence_length + 1, TASK_LENGTH if options.tasks else 0)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="evaluate-"))
            chosen = vllm_backend(source, options.dtype, longest, Path(folder) / "vllm.log")
        else:
            chosen = url_backend(options.backend, source)
        yield stack.enter_context(chosen)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what it started
    main()
