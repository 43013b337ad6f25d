"""Compress a model by a recipe, as one MLflow run with the checkpoint registered as a logged model.

    mlflow run mlflow_projects/compress -P model=MODEL -P recipe=id -P data=TEXT -P output=OUT \
        --env-manager local

MODEL is a directory, a hub name or `smollm2`; the recipe a file, or the name of one in recipes/;
TEXT a .txt, .raw or .jsonl file, a folder of such, or a data set on the hub. `mlflow run` starts in
the project's own folder: give whole paths (-P output=$PWD/out). The checkpoint stays where it is;
MLflow's logged model says where.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from cur_modifier.compress import (
    check_recipe,
    compress,
    find_recipe,
    model_source,
    shipped_recipes,
    weight_bytes,
)
from mlflow_projects.arguments import check_output, count, elsewhere

PROJECT = Path(__file__).resolve().parent
# Metrics of the stage by which models are compared, so they belong to the model as well.
COMPARED = ("ratio_targets", "ratio_model")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without loading a model."""
    parser = argparse.ArgumentParser(
        prog="compress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    known = ", ".join(shipped_recipes())
    parser.add_argument("--recipe", required=True, type=find_recipe, help=f"{known}, or a file")
    parser.add_argument("--data", required=True, help="text to calibrate on")
    parser.add_argument("--samples", type=count, default=64, help="windows of it")
    parser.add_argument("--sequence-length", type=count, default=1024, help="tokens a window")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--output", required=True, type=Path, help="directory of the checkpoint")
    options = parser.parse_args(arguments)

    if not options.recipe.is_file():
        parser.error(
            f"no recipe {options.recipe}{elsewhere(options.recipe, PROJECT)}. Give a file, or one "
            f"of {known}."
        )
    check_output(parser, options.output, PROJECT)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Compress, save, register."""
    options = parse(arguments)
    import mlflow
    from transformers import AutoTokenizer

    from cur_modifier.data import read_documents, token_windows
    from mlflow_projects.registry import register

    try:
        check_recipe(options.recipe)
    except ValueError as error:
        sys.exit(f"compress: {error}")
    try:
        model = model_source(options.model)
    except FileNotFoundError as error:
        sys.exit(f"compress: {error}{elsewhere(options.model, PROJECT)}")
    try:
        token_windows(
            read_documents(options.data),
            AutoTokenizer.from_pretrained(model),
            windows=options.samples,
            sequence_length=options.sequence_length,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"compress: {error}{elsewhere(options.data, PROJECT)}")

    # Joins the run that `mlflow run` has made. The stage joins it, too.
    with mlflow.start_run() as run:
        seconds = compress(
            options.recipe,
            model,
            options.data,
            options.output,
            samples=options.samples,
            sequence_length=options.sequence_length,
            dtype=options.dtype,
        )
        output = options.output.resolve()
        logged = mlflow.get_run(run.info.run_id).data.metrics
        figures = {name: logged[name] for name in COMPARED if name in logged}
        figures |= {"oneshot_seconds": seconds, "bytes_checkpoint": float(weight_bytes(output))}
        registered = register(
            run.info.run_id,
            f"{Path(options.model).name}-{options.recipe.stem}",
            output,
            {"model": options.model, "recipe": options.recipe.stem, "data": options.data},
        )
        mlflow.log_metrics(figures, model_id=registered.model_id)
        print(f"{output}\nMLflow run {run.info.run_id}, model {registered.model_id}")


if __name__ == "__main__":
    main()
