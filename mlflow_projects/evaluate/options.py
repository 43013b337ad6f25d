"""What an evaluation is asked for."""

from __future__ import annotations

import argparse

from mlflow_projects.arguments import count, count_or_none, names


def parse(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without loading a model."""
    parser = argparse.ArgumentParser(
        prog="evaluate",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=names, default=[], help="texts, comma-separated")
    parser.add_argument("--windows", type=count, default=24, help="windows of each text")
    parser.add_argument("--sequence-length", type=count, default=1024, help="tokens a window")
    parser.add_argument(
        "--stride", type=count_or_none, default=None, help="tokens between windows; 0: no overlap"
    )
    parser.add_argument("--tasks", type=names, default=[], help="comma-separated")
    parser.add_argument("--task-data", default="", help="folder of the tasks' questions")
    parser.add_argument(
        "--split",
        choices=["validation", "whole"],
        default="validation",
        help="of a task file that serves for training as well: a fifth, or all of it",
    )
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
