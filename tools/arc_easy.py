"""ARC-Easy by lm_eval, of one checkpoint through transformers and through a running ``vllm serve``.

    python tools/arc_easy.py CHECKPOINT --data ARC-Easy.test.jsonl

Two readers of one checkpoint must agree within the standard error of the accuracy. DATA is a .jsonl
file with `query`, `choices` and `gold` (index of the right choice) in each line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))


def task(data: Path) -> dict[str, Any]:
    """The lm_eval task, as the harness's own ``arc_easy`` but for where the questions lie."""
    measures = ("acc", "acc_norm")
    return {
        "task": "arc_easy_file",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [
            {"metric": measure, "aggregation": "mean", "higher_is_better": True}
            for measure in measures
        ],
    }


def accuracy(
    model: str, model_args: dict[str, Any], data: Path, questions: int
) -> dict[str, float]:
    """``acc``, ``acc_norm`` and the standard error of each on the first ``questions``."""
    from lm_eval import simple_evaluate

    output = simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=[task(data)],
        limit=questions,
    )
    [results] = output["results"].values()
    return {
        name.replace(",none", ""): float(value)
        for name, value in results.items()
        if name.startswith("acc") and value != "N/A"
    }


def by_transformers(
    checkpoint: Path, data: Path, questions: int, dtype: str = "float32"
) -> dict[str, float]:
    """Through ``from_pretrained``."""
    import cur_modifier  # noqa: F401 - registers the quantizer

    return accuracy(
        "hf",
        {"pretrained": str(checkpoint), "dtype": dtype, "device": "cpu", "batch_size": 8},
        data,
        questions,
    )


def by_server(
    url: str, name: str, checkpoint: Path, data: Path, questions: int
) -> dict[str, float]:
    """Through the server at ``url`` that calls the checkpoint ``name``."""
    os.environ.setdefault("OPENAI_API_KEY", "not needed")
    return accuracy(
        "local-completions",
        {
            "model": name,
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(checkpoint),
            "tokenizer_backend": "huggingface",
            "tokenized_requests": True,
            "num_concurrent": 8,
            "max_length": 1024,
        },
        data,
        questions,
    )


def main() -> None:
    """Both, and the difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help=".jsonl file of questions")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    if not options.data.is_file():
        parser.error(f"no file {options.data}")
    from vllm_server import serve

    with serve(
        options.checkpoint,
        *("--dtype", options.dtype, "--max-model-len", "1024", "--enforce-eager"),
        *("--served-model-name", "checkpoint"),
        log=Path("arc_easy.vllm.log"),
    ) as server:
        served = by_server(
            server.url, "checkpoint", options.checkpoint, options.data, options.questions
        )
    loaded = by_transformers(options.checkpoint, options.data, options.questions, options.dtype)
    print(json.dumps({"vllm": served, "transformers": loaded}, indent=2))


if __name__ == "__main__":
    main()
