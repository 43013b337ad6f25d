"""Perplexity on texts and accuracy on tasks of one model, logged with the model's own run.

    mlflow run mlflow_projects/evaluate -P model=$PWD/out -P data=$PWD/wiki.test.raw \
        -P tasks=boolq,piqa -P task_data=$PWD/zeroshot --env-manager local

MODEL is a directory, a hub name or `smollm2`; DATA names texts, comma-separated (files, folders or
hub names); TASKS those of lm-eval, asked of the hub or of local files (TASK_DATA, laid out as
local_tasks.py says). BACKEND is `transformers`, `vllm` (which starts a server and ends it) or the
URL of a server that serves the model. BASELINE is a second model, the dense one usually, measured
in the same run. A checkpoint that `compress` registered gets the figures too: its logged model, and
the run that made it.
"""

from __future__ import annotations

import argparse
import csv
import io
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
from mlflow_projects.arguments import count, count_or_none, elsewhere, names, text_name
from mlflow_projects.evaluate.tasks import BadInputError, Figure, Tasks

PROJECT = Path(__file__).resolve().parent
TASK_LENGTH = 2048  # tokens of a prompt that tasks may need


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without loading a model."""
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=names, default=[], help="texts, comma-separated")
    parser.add_argument("--windows", type=count, default=24, help="windows of each text")
    parser.add_argument("--sequence-length", type=count, default=1024, help="tokens a window")
    parser.add_argument(
        "--stride", type=count_or_none, default=None, help="tokens between windows; 0: no overlap"
    )
    parser.add_argument("--tasks", type=names, default=[], help="of lm-eval, comma-separated")
    parser.add_argument("--task-data", default="", help="folder of the tasks' questions")
    parser.add_argument(
        "--limit", type=count_or_none, default=None, help="questions a task; 0: all"
    )
    parser.add_argument("--few-shot", type=float, default=-1, help="-1: as each task has it")
    parser.add_argument(
        "--batch-size", type=count, default=8, help="questions at a time, in transformers"
    )
    parser.add_argument("--backend", default="transformers", help="transformers, vllm, or a URL")
    parser.add_argument(
        "--dtype",
        default="",
        choices=["", "float32", "bfloat16", "float16"],
        help="float32 in transformers and the checkpoint's own in vLLM by default",
    )
    parser.add_argument("--baseline", default="", help="a model to compare with")
    options = parser.parse_args(arguments)

    if not options.data and not options.tasks:
        parser.error("nothing to measure: give data=TEXT, tasks=NAMES, or both.")
    if options.baseline == options.model:
        parser.error(f"the baseline is the model itself, {options.model}. Name another, or none.")
    if options.stride is not None and options.stride > options.sequence_length:
        parser.error(
            f"stride {options.stride} leaves out tokens between windows of "
            f"{options.sequence_length}. Give at most that, or 0 for no overlap."
        )
    if options.few_shot not in (-1, *range(100)):
        parser.error(f"few_shot {options.few_shot:g} is not a whole number from 0, nor -1.")
    options.few_shot = None if options.few_shot < 0 else int(options.few_shot)
    url = options.backend.startswith(("http://", "https://"))
    if not url and options.backend not in ("transformers", "vllm"):
        parser.error(
            f"backend {options.backend!r} is not transformers, vllm or the URL of a server."
        )
    if url and options.dtype:
        parser.error(
            f"{options.backend} serves in a dtype of its own, so {options.dtype} would have no "
            "effect. Leave dtype out."
        )
    if url and options.baseline:
        parser.error(
            f"{options.backend} serves one model, so it can't measure a baseline as well. Evaluate "
            "the baseline by itself, or give backend=vllm."
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, log, print."""
    options = parse(arguments)
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
    documents = _documents(options)
    texts = _windows(documents, sources[options.model], options)
    if options.baseline:
        _check_tokens(options, texts, _windows(documents, sources[options.baseline], options))
    tasks = _tasks(options)
    _check_backend(options)

    with mlflow.start_run() as run:
        model = registered(sources[options.model])
        if model is not None:
            mlflow.set_tags(
                {"mlflow.parentRunId": model.source_run_id, "evaluated_model": model.model_id}
            )
        figures: dict[str, list[Figure]] = {}
        for name, source in sources.items():
            figures[name], raw = _measured(source, texts, tasks, options)
            if raw is not None:
                mlflow.log_dict(raw, f"lm_eval-{_role(name, options)}.json")
            _log(figures[name], _role(name, options), model)
        mlflow.log_text(_csv(figures), "figures.csv")
        if options.baseline:
            from mlflow_projects.figures import before_after

            mlflow.log_figure(before_after(*figures.values()), "before_after.png")
        print(_table(figures))
        print(f"MLflow run {run.info.run_id}" + (f", model {model.model_id}" if model else ""))


def _measured(
    source: str, texts: Mapping[str, Any], tasks: Tasks | None, options: argparse.Namespace
) -> tuple[list[Figure], dict[str, Any] | None]:
    """All figures of one model, with lm-eval's own results. The model is gone afterwards."""
    with _backend(options, source) as backend:
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


def _tasks(options: argparse.Namespace) -> Tasks | None:
    if not options.tasks:
        return None
    try:
        return Tasks(options)
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
def _backend(options: argparse.Namespace, source: str) -> Iterator[Any]:
    from mlflow_projects.evaluate.backends import transformers_backend, url_backend, vllm_backend

    with ExitStack() as stack:
        if options.backend == "transformers":
            chosen = transformers_backend(source, options.dtype, options.batch_size)
        elif options.backend == "vllm":
            longest = max(options.sequence_length + 1, TASK_LENGTH if options.tasks else 0)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="evaluate-"))
            chosen = vllm_backend(source, options.dtype, longest, Path(folder) / "vllm.log")
        else:
            chosen = url_backend(options.backend, source)
        yield stack.enter_context(chosen)


def _log(figures: list[Figure], role: str, model: Any | None) -> None:
    """To this run; the model's own also to its logged model and the run that made it."""
    import mlflow

    prefix = "" if role == "model" else "baseline/"
    values = {f"{prefix}{f.name}": f.value for f in figures}
    values |= {f"{prefix}{f.name}_stderr": f.stderr for f in figures if f.stderr is not None}
    if role != "model" or model is None:
        mlflow.log_metrics(values)
        return
    mlflow.log_metrics(values, model_id=model.model_id)
    mlflow.log_metrics(values, run_id=model.source_run_id)


def _csv(figures: Mapping[str, list[Figure]]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["model", "figure", "value", "standard_error", "of"])
    for name, found in figures.items():
        rows.writerows([name, f.name, f.value, f.stderr, f.of] for f in found)
    return text.getvalue()


def _table(figures: Mapping[str, list[Figure]]) -> str:
    """A line a figure, a column a model."""
    columns = list(figures)
    width = max(len(f.name) for found in figures.values() for f in found) + 2
    lines = [f"\n{'':<{width}}" + "".join(f"{Path(name).name[-22:]:>24}" for name in columns)]
    for index, first in enumerate(figures[columns[0]]):
        cells = ""
        for name in columns:
            found = figures[name][index]
            spread = "" if found.stderr is None else f" ± {found.stderr:.4f}"
            cells += f"{f'{found.value:.4f}{spread}':>24}"
        lines.append(f"{first.name:<{width}}{cells}   {first.of}")
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what it started
    main()
