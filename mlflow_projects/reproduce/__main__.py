"""The experiments of CURing, CUR4LLM and STAT on a model of your own, each with table and figure.

    mlflow run mlflow_projects/reproduce -e selection -P data=$PWD/data -P output=$PWD/out \
        --env-manager local

Experiments: curing (2, 5 and 10 layers, no healing), selection (which rows and columns), rank (rank
against perplexity), domains (calibrate on each text, evaluate on all), weights (singular values and
maps of the weights), stat (encoders on tasks of GLUE, pruned to shares of their
multiply-accumulates, beside published methods), pruning (neurons and heads of a decoder against row
IDs and CUR, also in 4 bits), convolution (channels of two small networks that it trains on
CIFAR-10). DATA holds wikitext2-raw/wiki.valid.raw and wiki.test.raw and
c4/c4_en_train_first1000.jsonl; for stat it is the folder of task data, and MODELS holds the dense
checkpoint of each task in a folder of its name, as mlflow_projects/finetune makes it; for
convolution DATA holds the images of cifar10. Rows are kept
in OUTPUT as they finish: a stopped experiment continues. OUTPUT/RESULTS.md has a section an
experiment.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")

from cur_modifier.checkpoint.files import put_text
from cur_modifier.compress import model_source
from mlflow_projects.arguments import (
    check_output,
    count,
    count_or_none,
    elsewhere,
    names,
    shares,
    whole,
)
from mlflow_projects.figures import put_figure
from mlflow_projects.reproduce.cases import Experiment, Harness
from mlflow_projects.reproduce.draw import MAP_CELLS, decay, structure
from mlflow_projects.reproduce.experiments import EXPERIMENTS

PROJECT = Path(__file__).resolve().parent
NAMES = (*EXPERIMENTS, "weights")
WEIGHTS = ("model", "samples", "windows", "sequence_length", "layers", "seed")
TASKS = "sst2,mrpc,qnli,stsb"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without loading a model."""
    parser = argparse.ArgumentParser(
        prog="reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=NAMES)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True, type=Path, help="folder of the texts")
    parser.add_argument("--output", required=True, type=Path, help="folder of rows and figures")
    parser.add_argument("--models", type=Path, help="stat: folder of dense checkpoints, by task")
    parser.add_argument("--tasks", type=names, default=names(TASKS), help=f"of stat [{TASKS}]")
    parser.add_argument(
        "--budgets", type=shares, default=[], help="shares that may be left; none: the experiment's"
    )
    parser.add_argument("--limit", type=count_or_none, help="validation examples; 0: all")
    parser.add_argument("--samples", type=count, default=64, help="calibration windows, examples")
    parser.add_argument("--windows", type=count, default=24, help="windows to evaluate on")
    parser.add_argument("--sequence-length", type=count, default=1024, help="tokens of each")
    parser.add_argument("--layers", type=count, default=10, help="that CUR takes, as published")
    parser.add_argument("--epochs", type=count, default=60, help="convolution: of training")
    parser.add_argument("--seed", type=whole, default=0)
    options = parser.parse_args(arguments)
    check_output(parser, options.output, PROJECT)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run one experiment."""
    options = parse(arguments)
    import mlflow

    experiment = EXPERIMENTS.get(options.experiment)
    if experiment is None or "model" in experiment.settings:
        try:
            source = model_source(options.model)
        except FileNotFoundError as error:
            sys.exit(f"reproduce: {error}{elsewhere(options.model, PROJECT)}")
    if experiment is None:  # no data, no compression
        options.output.mkdir(parents=True, exist_ok=True)
        with mlflow.start_run():
            _weights(source, options)
        return
    cases = experiment.cases(options)
    try:
        harness = experiment.harness(options, cases)
    except (OSError, ValueError) as error:
        sys.exit(f"reproduce: {error}{elsewhere(options.data, PROJECT)}")
    options.output.mkdir(parents=True, exist_ok=True)
    with mlflow.start_run():
        _experiment(experiment, cases, harness, options)


def _experiment(
    experiment: Experiment, cases: Sequence[Any], harness: Harness, options: argparse.Namespace
) -> None:
    import mlflow

    file = options.output / f"{options.experiment}.json"
    settings = {name: getattr(options, name) for name in experiment.settings}
    settings["data"] = options.data
    settings = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in settings.items()}
    kept = _read(file, settings)
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases, start=1):
        found = next((row for row in kept if case.labels.items() <= row.items()), None)
        if found is None:
            label = ", ".join(f"{key} {value}" for key, value in case.labels.items())
            print(f"== {options.experiment} {number} of {len(cases)}: {label}", flush=True)
            found = case.labels | harness.measure(case)
        rows.append(found)
        held = [*rows, *(row for row in kept if row not in rows)]
        put_text(file, json.dumps({"settings": settings, "rows": held}, indent=2) + "\n")
    _log_figure(options.output / f"{options.experiment}.png", experiment.figure(rows))
    section = _section(
        options,
        experiment.question,
        experiment.table(rows),
        experiment.findings(rows),
        settings=(*experiment.settings, *experiment.chooses),
    )
    mlflow.log_text(section, f"{options.experiment}.md")
    mlflow.log_table({key: [row[key] for row in rows] for key in rows[0]}, "rows.json")
    for step, row in enumerate(rows):
        mlflow.log_metrics(experiment.metrics(row), step=step)
    _put_section(options.output / "RESULTS.md", options.experiment, section)
    print(section)


Spectra = dict[str, dict[int, list[float]]]
Maps = dict[str, dict[int, Any]]


def _spectra(layers: Sequence[tuple[str, Any]]) -> tuple[Spectra, Maps, list[dict[str, Any]]]:
    """Singular values and maps of |W|, by projection and layer, and a row a weight."""
    import torch
    from torch.nn.functional import adaptive_avg_pool2d
    from tqdm import tqdm

    spectra: Spectra = {}
    maps: Maps = {}
    rows = []
    for index, (name, layer) in enumerate(tqdm(layers, desc="Singular values")):
        for path, module in layer.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            projection = path.rpartition(".")[2]
            weight = module.weight.detach()
            values = torch.linalg.svdvals(weight)
            spectra.setdefault(projection, {})[index] = values.tolist()
            cells = [min(side, MAP_CELLS) for side in weight.shape]
            blocks = adaptive_avg_pool2d(weight.abs()[None], cells)[0]
            maps.setdefault(projection, {})[index] = blocks.numpy()
            energy = values.double().square().cumsum(0)
            share = energy / energy[-1]
            rows.append(
                {
                    "layer": index,
                    "projection": projection,
                    "shape": f"{weight.shape[0]}x{weight.shape[1]}",
                    "stable rank": float(energy[-1] / values[0].double().square()),
                    "rank of 90 % energy": int((share < 0.9).sum()) + 1,
                    "rank of 99 % energy": int((share < 0.99).sum()) + 1,
                    "module": f"{name}.{path}",
                }
            )
    return spectra, maps, rows


def _weights(source: str, options: argparse.Namespace) -> None:
    """Singular values and maps of |W|: no data, no compression."""
    import mlflow
    import torch
    from transformers import AutoModelForCausalLM

    from cur_modifier.structure.layers import decoder_layers

    layers = decoder_layers(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    spectra, maps, rows = _spectra(layers)
    shown = sorted({round(i * (len(layers) - 1) / 4) for i in range(5)})
    for file, figure in (
        ("decay.png", decay(spectra)),
        ("structure.png", structure(maps, shown)),
    ):
        _log_figure(options.output / file, figure)
    mlflow.log_table({key: [row[key] for row in rows] for key in rows[0]}, "rows.json")
    summary = [
        {"projection": projection}
        | {
            key: _span([row[key] for row in rows if row["projection"] == projection])
            for key in ("stable rank", "rank of 90 % energy", "rank of 99 % energy")
        }
        for projection in spectra
    ]
    section = _section(
        options,
        "How fast do the singular values fall, and what do the weights look like?",
        summary,
        ["Of each projection, the range over all layers."],
        figures=("decay.png", "structure.png"),
    )
    mlflow.log_text(section, "weights.md")
    _put_section(options.output / "RESULTS.md", "weights", section)
    print(section)


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}"


def _read(file: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier start.

    Raises:
        SystemExit: they were measured under other settings.
    """
    if not file.exists():
        return []
    held = json.loads(file.read_text())
    if held["settings"] != settings:
        changed = [name for name in settings if held["settings"].get(name) != settings[name]]
        sys.exit(
            f"reproduce: {file} holds rows measured with another {', '.join(changed)}. Give "
            "another output, or the same settings."
        )
    return held["rows"]


def _log_figure(file: Path, figure: Any) -> None:
    """Beside the rows, and into the run."""
    import mlflow

    put_figure(file, figure)
    mlflow.log_artifact(str(file))


def _section(
    options: argparse.Namespace,
    question: str,
    rows: Sequence[Mapping[str, Any]],
    findings: Sequence[str],
    figures: Sequence[str] | None = None,
    settings: Sequence[str] = WEIGHTS,
) -> str:
    """One experiment in Markdown."""
    columns = list(rows[0])
    first, *others = settings
    given = {first: getattr(options, first), "data": "DATA", "output": "OUT"}
    given |= {name: _parameter(getattr(options, name)) for name in others}
    given = {key: "MODELS" if isinstance(v, Path) else v for key, v in given.items()}
    given = {key: value for key, value in given.items() if value != ""}
    command = f"mlflow run mlflow_projects/reproduce -e {options.experiment} --env-manager local "
    lines = [
        f"## {options.experiment}",
        "",
        question,
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows),
        "",
        *(f"{finding}" for finding in findings),
        "",
        *(f"![{name}]({name})" for name in figures or (f"{options.experiment}.png",)),
        "",
        "```",
        command + " ".join(f"-P {key}={shlex.quote(str(value))}" for key, value in given.items()),
        "```",
        "",
    ]
    return "\n".join(lines)


def _parameter(value: Any) -> Any:
    """A setting as the command takes it; empty for the default."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return 0 if value is None else value


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _put_section(file: Path, name: str, section: str) -> None:
    """Replace the section ``name``, or add it; sections stand in the order of ``NAMES``.

    What stands above the first section stays, and sections of other names come last.
    """
    held = {}
    head, *parts = file.read_text().split("\n## ") if file.exists() else ["# Results"]
    for part in parts:
        held[part.partition("\n")[0].strip()] = f"## {part.strip()}\n"
    held[name] = section
    order = [*(key for key in NAMES if key in held), *(key for key in held if key not in NAMES)]
    body = "\n".join(held[key].rstrip() + "\n" for key in order)
    put_text(file, f"{head.rstrip()}\n\n{body}")


if __name__ == "__main__":
    main()
