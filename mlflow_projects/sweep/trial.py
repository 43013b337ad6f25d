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

from files import put_text  # noqa: E402


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """Compress by the recipe, save, load again, and measure; returns what the study wants."""
    import mlflow
    import run
    import yaml
    from arguments import text_name
    from registry import register

    folder = Path(given["folder"])
    checkpoint = folder / "checkpoint"
    with mlflow.start_run() as joined:
        mlflow.log_params(given["params"])
        metrics: dict[str, float] = {}
        if given["recipe"]:
            recipe = folder / "recipe.yaml"
            recipe.write_text(yaml.safe_dump(given["recipe"], sort_keys=False))
            mlflow.log_artifact(str(recipe))
            metrics["oneshot_seconds"] = run.compress(
                recipe,
                given["model"],
                given["data"],
                checkpoint,
                samples=given["samples"],
                sequence_length=given["sequence_length"],
                dtype=given["dtype"],
            )
        else:  # the reference, in the same dtype
            run.save_dense(given["model"], checkpoint, dtype=given["dtype"])
        metrics["bytes_checkpoint"] = float(run.weight_bytes(checkpoint))
        found = run.measure(
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
