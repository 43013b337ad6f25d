"""Run one recipe on one model, save the checkpoint, and say what it cost and what it saved.

    python -m cur_modifier.compress cur_then_gptq --model MODEL --calibrate TEXT --output OUT

``python recipes/run.py`` is the same command. The recipe is a file, or the name of one that comes
with this package. MODEL is a directory or hub name, or in a clone of the repository ``smollm2``,
which tools/smollm2.py fetches. TEXT is a .txt, .raw or .jsonl file, a folder of such, or a data set
on the hub. With ``--evaluate TEXT`` the perplexity of the saved checkpoint, loaded with
``from_pretrained`` in float32, is measured on 24 windows of 1024 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from cur_modifier.rows import Row, put_row, read_rows

__all__ = [
    "check_folder",
    "check_recipe",
    "compress",
    "count",
    "find_recipe",
    "main",
    "measure",
    "model_source",
    "save_dense",
    "shipped_recipes",
    "weight_bytes",
    "whole",
]

EVALUATION_LENGTH = 1024  # tokens a window
FETCHED = ("minilm", "smollm2")  # models that tools/NAME.py fetches where no hub is reached


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "recipe", type=find_recipe, help=f"{', '.join(shipped_recipes())}, or a file"
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibrate", required=True, help="text to calibrate on")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--samples", type=count, default=32, help="calibration windows")
    parser.add_argument("--sequence-length", type=count, default=512, help="tokens a window")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--evaluate", help="text to measure perplexity on")
    parser.add_argument(
        "--windows",
        type=count,
        default=24,
        help=f"evaluation windows of {EVALUATION_LENGTH} tokens",
    )
    parser.add_argument("--results", type=Path, help="JSON file that the result is added to")
    options = parser.parse_args(arguments)
    if not options.recipe.is_file():
        parser.error(f"no recipe {options.recipe}; see recipes/README.md for the list")
    check_folder(parser, "output", options.output)
    if options.results:
        check_folder(parser, "results", options.results.parent)
    return options


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with this package by name: in a clone those of its ``recipes/``."""
    package = Path(__file__).resolve().parent
    folders = (package / "recipes", package.parent / "recipes")  # a wheel has them in the package
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file ``name``, else the shipped recipe ``name`` or ``name.yaml``.

    Where there is neither, the path as given: the caller says what it expected.
    """
    path = Path(name)
    shipped = None if path.is_file() else shipped_recipes().get(name.removesuffix(".yaml"))
    return shipped or path


def count(text: str) -> int:
    """A whole number from 1; MLflow writes those of a project as 64.0 or 64."""
    return _whole(text, 1)


def whole(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = float(text)
        if value != int(value) or value < least:
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least}.") from None
    return int(value)


def check_folder(parser: argparse.ArgumentParser, option: str, folder: Path) -> None:
    """End with an error where ``folder`` can't be made or written to."""
    held = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not held.is_dir():
        within = "" if held == folder else f" lies below {held}, which"
        parser.error(f"{option} {folder}{within} is a file. Name a folder.")
    if not os.access(held, os.W_OK | os.X_OK):
        parser.error(f"{option} {folder}: no permission to write in {held}. Name another folder.")


def check(options: argparse.Namespace) -> str:
    """What can be wrong with recipe, model, texts and results, before the slow part; returns what
    transformers loads.

    Raises:
        OSError, ValueError: one of them is missing, unreadable or too short.
    """
    check_recipe(options.recipe)
    if options.results:
        read_rows(options.results, row_key)
    model_name = model_source(options.model)

    from transformers import AutoTokenizer

    from cur_modifier.data import read_documents, token_windows

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    wanted = [(options.calibrate, options.samples, options.sequence_length)]
    if options.evaluate:
        wanted.append((options.evaluate, options.windows, EVALUATION_LENGTH))
    for text, windows, length in wanted:
        try:
            token_windows(read_documents(text), tokenizer, windows=windows, sequence_length=length)
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
    return model_name


def check_recipe(path: Path) -> None:
    """Build the modifiers of a recipe, which checks their fields.

    Raises:
        ValueError: no YAML or JSON; a modifier or field that does not exist; a part that
            llm-compressor would pass over without a word, by its name or its place.
    """
    import yaml
    from llmcompressor.recipe import Recipe

    try:
        given = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    stages = given if isinstance(given, dict) else {}
    for stage, groups in stages.items():
        if stage == "args":
            continue
        _check_part(path, stage, groups, "stage", "_stage")
        for group, modifiers in groups.items():
            if isinstance(modifiers, str):  # an argument of the stage, such as `run_type: oneshot`
                continue
            _check_part(path, group, modifiers, "group of modifiers", "_modifiers")
            for modifier, fields in modifiers.items():
                _check_part(path, modifier, fields, "modifier", "")
    try:
        found = Recipe.create_instance(str(path)).modifiers if stages else []
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not found:
        raise ValueError(f"{path} names no modifier; see recipes/README.md for examples.")


def _check_part(path: Path, name: Any, part: Any, kind: str, ending: str) -> None:
    if not str(name).endswith(ending):
        raise ValueError(
            f"{path}: llm-compressor would pass over {name}; the name of a {kind} ends in {ending}."
        )
    if not isinstance(part, dict):
        raise ValueError(
            f"{path}: {kind} {name} is no mapping. Without fields it is `{name}: {{}}`."
        )


def model_source(name: str) -> str:
    """What transformers loads: a directory as a whole path, `smollm2` or `minilm` as the one it
    lies in, or a hub name.

    Raises:
        FileNotFoundError: a path where no checkpoint lies, or one of our names outside a clone.
    """
    if name in FETCHED:
        return _fetched(name)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name} is not a checkpoint: it holds no config.json.")
        return str(path.resolve())
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"no checkpoint at {name}.")
    return name


def _fetched(name: str) -> str:
    module = f"tools.{name}"
    try:
        return str(getattr(import_module(module), name)())
    except ModuleNotFoundError as error:
        if error.name not in ("tools", module):
            raise
        raise FileNotFoundError(
            f"model {name} is fetched by tools/{name}.py of cur_modifier's repository, which is "
            f"not installed here. Run `python -m {module}` in a clone and give the directory that "
            "it prints, or name another model."
        ) from None


def compress(
    recipe: Path,
    model_name: str,
    calibrate: str | Path,
    output: Path,
    *,
    samples: int,
    sequence_length: int,
    dtype: str = "bfloat16",
) -> float:
    """Calibrate, compress and save; returns the seconds that ``oneshot`` took.

    ``dtype`` is that of the checkpoint; the work is done in float32 where bfloat16 would be
    emulated at a fraction of its speed.
    """
    import torch
    from llmcompressor import oneshot  # type: ignore[attr-defined]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cur_modifier.data import calibration_dataset
    from cur_modifier.precision import computed_dtype

    wanted = getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    dataset = calibration_dataset(
        calibrate, tokenizer, samples=samples, sequence_length=sequence_length
    )
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=computed_dtype(wanted))
    started = time.perf_counter()
    oneshot(model=model, dataset=dataset, recipe=str(recipe))
    seconds = time.perf_counter() - started
    model.to(wanted).save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)
    return seconds


def save_dense(model_name: str, target: Path, *, dtype: str = "bfloat16") -> None:
    """The model as it is, in a dtype, so that bytes compare like with like."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=getattr(torch, dtype))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(model_name).save_pretrained(target)


def measure(checkpoint: Path, text: str, *, windows: int, sequence_length: int) -> float:
    """Perplexity of a saved checkpoint, loaded in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cur_modifier.data import read_documents, token_windows
    from cur_modifier.evaluate import perplexity

    ids = token_windows(
        read_documents(text),
        AutoTokenizer.from_pretrained(checkpoint),
        windows=windows,
        sequence_length=sequence_length,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if torch.cuda.is_available():
        model.to("cuda")
    return perplexity(model, ids).perplexity


def weight_bytes(directory: str | Path) -> int:
    """Bytes of a checkpoint's own safetensors files; others may lie beside them."""
    return sum(file.stat().st_size for file in Path(directory).glob("model*.safetensors"))


def row_key(row: Row) -> tuple[Any, ...]:
    """What a row of results measures; rows of earlier releases do not say on what."""
    wanted = ("recipe", "model", "calibration", "dtype")
    return *(row[name] for name in wanted), row.get("evaluation")


def main(arguments: list[str] | None = None) -> None:
    """Compress, evaluate, print."""
    options = parse(arguments)
    try:
        model_name = check(options)
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
    seconds = compress(
        options.recipe,
        model_name,
        options.calibrate,
        options.output,
        samples=options.samples,
        sequence_length=options.sequence_length,
        dtype=options.dtype,
    )
    result: dict[str, Any] = {
        "recipe": options.recipe.stem,
        "model": options.model,
        "calibration": f"{options.samples} x {options.sequence_length} of "
        f"{Path(options.calibrate).name}",
        "seconds": round(seconds, 1),
        "dtype": options.dtype,
        "bytes": weight_bytes(options.output),
    }
    if options.evaluate:
        found = measure(
            options.output,
            options.evaluate,
            windows=options.windows,
            sequence_length=EVALUATION_LENGTH,
        )
        result["evaluation"] = (
            f"{options.windows} x {EVALUATION_LENGTH} of {Path(options.evaluate).name}"
        )
        result["perplexity"] = round(found, 2)
    print(json.dumps(result, indent=2))
    if options.results:
        put_row(options.results, result, row_key)


if __name__ == "__main__":
    main()
