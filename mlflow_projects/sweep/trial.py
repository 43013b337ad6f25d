"""One point of a sweep in a process of its own: compressed, saved, measured, logged to its run.

The sweep starts it with the run in MLFLOW_RUN_ID; a crash ends this trial alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from cur_modifier import compress
from cur_modifier.checkpoint.files import put_text
from mlflow_projects.arguments import text_name
from mlflow_projects.registry import register


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """Compress by the recipe, save, load again, and measure; returns what the study wants."""
    import mlflow
    import yaml

    folder = Path(given["folder"])
    checkpoint = folder / "checkpoint"
    with mlflow.start_run() as joined:
        mlflow.log_params(given["params"])
        metrics: dict[str, float] = {}
        if given["recipe"]:
            recipe = folder / "recipe.yaml"
            recipe.write_text(yaml.safe_dump(given["recipe"], sort_keys=False))
            mlflow.log_artifact(str(recipe))
            metrics["oneshot_seconds"] = compress.compress(
                recipe,
                given["model"],
                given["data"],
                checkpoint,
                samples=given["samples"],
                sequence_length=given["sequence_length"],
                dtype=given["dtype"],
            )
        else:  # the reference, in the same dtype
            compress.save_dense(given["model"], checkpoint, dtype=given["dtype"])
        metrics["bytes_checkpoint"] = float(compress.weight_bytes(checkpoint))
        found = compress.measure(
            checkpoint,
            given["text"],
            windows=given["windows"],
            sequence_length=given["window_length"],
        )
        metrics[f"perplexity/{text_name(given['text'])}"] = found
        registered = register(
            joined.info.run_id,
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
    put_text(request.with_name("result.json"), json.dumps(result))
