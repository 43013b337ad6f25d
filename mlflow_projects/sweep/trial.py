"""One point of a sweep in a process of its own: compressed, saved, measured, logged to its run.

``sweep.py`` starts it with the run in MLFLOW_RUN_ID; a crash ends this trial alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PROJECT = Path(__file__).resolve().parent
REPOSITORY = PROJECT.parent.parent
sys.path[:0] = [
    str(folder) for folder in (PROJECT.parent, REPOSITORY / "recipes", REPOSITORY / "tools")
]


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """Compress by the recipe, save, load again, and measure; returns what the study wants."""
    import mlflow
    import torch
    import yaml
    from arguments import text_name
    from registry import register
    from run import compress, weight_bytes
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import cur_modifier  # noqa: F401 - registers the format
    from cur_modifier.data import read_documents, token_windows
    from cur_modifier.evaluate import perplexity

    folder = Path(given["folder"])
    checkpoint = folder / "checkpoint"
    with mlflow.start_run() as run:
        mlflow.log_params(given["params"])
        metrics: dict[str, float] = {}
        if given["recipe"]:
            recipe = folder / "recipe.yaml"
            recipe.write_text(yaml.safe_dump(given["recipe"], sort_keys=False))
            mlflow.log_artifact(str(recipe))
            metrics["oneshot_seconds"] = compress(
                recipe,
                given["model"],
                given["data"],
                checkpoint,
                samples=given["samples"],
                sequence_length=given["sequence_length"],
                dtype=given["dtype"],
            )
        else:  # the reference, in the same dtype
            dtype = getattr(torch, given["dtype"])
            dense = AutoModelForCausalLM.from_pretrained(given["model"], dtype=dtype)
            dense.save_pretrained(checkpoint)
            AutoTokenizer.from_pretrained(given["model"]).save_pretrained(checkpoint)
            del dense
        metrics["bytes_checkpoint"] = float(weight_bytes(checkpoint))
        windows = token_windows(
            read_documents(given["text"]),
            AutoTokenizer.from_pretrained(checkpoint),
            windows=given["windows"],
            sequence_length=given["window_length"],
        )
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        if torch.cuda.is_available():
            model.to("cuda")
        found = perplexity(model, windows).perplexity
        metrics[f"perplexity/{text_name(given['text'])}"] = found
        registered = register(
            run.info.run_id,
            given["name"],
            checkpoint.resolve(),
            {key: str(value) for key, value in given["params"].items()},
        )
        mlflow.log_metrics(metrics, model_id=registered.model_id)
    return {
        "bytes": metrics["bytes_checkpoint"],
        "perplexity": found,
        "model_id": registered.model_id,
    }


if __name__ == "__main__":
    request = Path(sys.argv[1])
    result = measure(json.loads(request.read_text()))
    partial = request.with_name("result.partial")
    partial.write_text(json.dumps(result))
    partial.replace(request.with_name("result.json"))
