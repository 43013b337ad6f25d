"""Many compressions of one model as one study: nested runs, and bytes against perplexity.

    mlflow run mlflow_projects/sweep -P data=$PWD/train.txt -P text=$PWD/test.txt \
        -P output=$PWD/sweep_out -P ratios=0.9,0.8,0.7 -P quantizations=none,gptq4 \
        --env-manager local

Every combination of FORMS (dense, id, cur), SELECTIONS (optimal for a row ID, or those of the
recipe), RATIOS and QUANTIZATIONS is one trial; SEARCH=tpe lets Optuna choose TRIALS of them. DATA
calibrates, TEXT is held out. A stopped sweep continues when it is started again with the same
OUTPUT: its finished trials are kept, one that was cut off is run again. The parent run draws the
Pareto front after each trial.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from pathlib import Path

from cur_modifier.compress import model_source
from mlflow_projects.arguments import check_output, count, elsewhere, names, whole
from mlflow_projects.sweep.space import FORMS, OPTIMAL, QUANTIZATIONS, points
from mlflow_projects.sweep.study import Sweep, SweepError

PROJECT = Path(__file__).resolve().parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without loading a model."""
    parser = argparse.ArgumentParser(
        prog="sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True, help="text to calibrate on")
    parser.add_argument("--text", required=True, help="text to measure perplexity on")
    parser.add_argument("--output", required=True, type=Path, help="folder of the study")
    parser.add_argument("--forms", type=names, default=["dense", "id"], help=", ".join(FORMS))
    parser.add_argument("--selections", type=names, default=[OPTIMAL])
    parser.add_argument("--ratios", type=_ratios, default=[0.9, 0.8, 0.7])
    parser.add_argument(
        "--quantizations", type=names, default=["none", "gptq4"], help=", ".join(QUANTIZATIONS)
    )
    parser.add_argument("--search", choices=["grid", "tpe"], default="grid")
    parser.add_argument("--trials", type=count, default=20, help="of a tpe search")
    parser.add_argument("--samples", type=count, default=64, help="calibration windows")
    parser.add_argument("--sequence-length", type=count, default=1024, help="tokens of each")
    parser.add_argument("--windows", type=count, default=24, help="windows to evaluate on")
    parser.add_argument("--window-length", type=count, default=1024, help="tokens of each")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--group-size", type=count, default=32, help="of 3 and 4 bits")
    parser.add_argument(
        "--keep", choices=["front", "all", "none"], default="front", help="checkpoints to keep"
    )
    parser.add_argument("--seed", type=whole, default=0)
    options = parser.parse_args(arguments)

    if not options.selections:
        parser.error(f"selections: nothing is given; name some, e.g. {OPTIMAL}.")
    for axis, known in (("forms", FORMS), ("quantizations", QUANTIZATIONS)):
        given = getattr(options, axis)
        if unknown := [value for value in given if value not in known]:
            parser.error(f"{axis}: {', '.join(unknown)} is not one of {', '.join(known)}.")
        if not given:
            parser.error(f"{axis}: nothing is given; name some of {', '.join(known)}.")
    options.points = list(
        points(options.forms, options.selections, options.ratios, options.quantizations)
    )
    if set(options.forms) - {point.form for point in options.points}:
        parser.error(
            f"form cur has no selection {OPTIMAL}. Name one that it has as well, e.g. "
            f"selections={','.join([*options.selections, 'deim'])}."
        )
    check_output(parser, options.output, PROJECT)
    options.output = options.output.resolve()
    return options


def _ratios(text: str) -> list[float]:
    try:
        values = [float(value) for value in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers.") from None
    if not values or not all(0 < value < 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"{text}: a ratio is parameters stored after ÷ before, between 0 and 1."
        )
    return values


def main(arguments: list[str] | None = None) -> None:
    """Check, then run what is not done yet."""
    options = parse(arguments)
    try:
        _check(options)
        Sweep(options).run()
    except SweepError as error:
        sys.exit(f"sweep: {error}")


def _check(options: argparse.Namespace) -> None:
    """Every recipe and both texts, before the first trial.

    Raises:
        SweepError: a recipe that no stage accepts, a group size that does not fit the model, a text
            that is missing or too short.
    """
    from transformers import AutoTokenizer

    from cur_modifier.data import read_documents, token_windows
    from cur_modifier.modifiers import CURModifier

    for point in options.points:
        stage = point.recipe(options.group_size, options.seed).get("compress_stage", {})
        if "cur_modifiers" in stage:
            try:
                CURModifier(**stage["cur_modifiers"]["CURModifier"])
            except ValueError as error:
                raise SweepError(f"{point}: {error}") from None
    try:
        options.model = model_source(options.model)
    except FileNotFoundError as error:
        raise SweepError(f"{error}{elsewhere(options.model, PROJECT)}") from None
    if any(point.grouped for point in options.points):
        _check_groups(options.model, options.group_size)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for name, windows, length in (
        ("data", options.samples, options.sequence_length),
        ("text", options.windows, options.window_length),
    ):
        path = getattr(options, name)
        try:
            token_windows(read_documents(path), tokenizer, windows=windows, sequence_length=length)
        except (OSError, ValueError) as error:
            raise SweepError(f"{name}: {error}{elsewhere(path, PROJECT)}") from None
        if Path(path).exists():
            setattr(options, name, str(Path(path).resolve()))


def _check_groups(model: str, group_size: int) -> None:
    """Whether groups divide what every Linear reads; the ranks of factors are chosen so that they
    do."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    linears = {
        name: module.in_features
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not skeleton.get_output_embeddings()
    }
    unfit = {name: width for name, width in linears.items() if width % group_size}
    if unfit:
        name, width = next(iter(unfit.items()))
        raise SweepError(
            f"group_size {group_size} does not divide the {width} inputs of {name}"
            + (f" and of {len(unfit) - 1} more" if len(unfit) > 1 else "")
            + f". Give a divisor of {math.gcd(*linears.values())}, or quantizations without "
            "groups: none, w8a8."
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what it started
    main()
