"""The experiments of CURing, CUR4LLM and STAT on a model of your own, each with table and figure.

    mlflow run mlflow_projects/reproduce -e selection -P data=$PWD/data -P output=$PWD/out \
        --env-manager local

Experiments: curing (2, 5 and 10 layers, no healing), selection (which rows and columns), rank (rank
against perplexity), domains (calibrate on each text, evaluate on all), weights (singular values and
maps of the weights). DATA holds wikitext2-raw/wiki.valid.raw and wiki.test.raw and
c4/c4_en_train_first1000.jsonl. Rows are kept in OUTPUT as they finish: a stopped experiment
continues. OUTPUT/RESULTS.md has a section an experiment.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")

from cur_modifier.checkpoint.files import put_text
from cur_modifier.compress import model_source
from mlflow_projects.arguments import check_output, count, elsewhere, whole
from mlflow_projects.figures import put_figure
from mlflow_projects.reproduce import domains
from mlflow_projects.reproduce.draw import MAP_CELLS, decay, structure
from mlflow_projects.reproduce.experiments import EXPERIMENTS, Case, Experiment

PROJECT = Path(__file__).resolve().parent
NAMES = (*EXPERIMENTS, "weights")
SETTINGS = ("model", "samples", "windows", "sequence_length", "layers", "seed")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without loading a model."""
    parser = argparse.ArgumentParser(
        prog="reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=NAMES)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True, type=Path, help="folder of the texts")
    parser.add_argument("--output", required=True, type=Path, help="folder of rows and figures")
    parser.add_argument("--samples", type=count, default=64, help="calibration windows")
    parser.add_argument("--windows", type=count, default=24, help="windows to evaluate on")
    parser.add_argument("--sequence-length", type=count, default=1024, help="tokens of each")
    parser.add_argument("--layers", type=count, default=10, help="that CUR takes, as published")
    parser.add_argument("--seed", type=whole, default=0)
    options = parser.parse_args(arguments)
    check_output(parser, options.output, PROJECT)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run one experiment."""
    options = parse(arguments)
    import mlflow

    try:
        source = model_source(options.model)
    except FileNotFoundError as error:
        sys.exit(f"reproduce: {error}{elsewhere(options.model, PROJECT)}")
    if options.experiment == "weights":
        options.output.mkdir(parents=True, exist_ok=True)
        with mlflow.start_run():
            _weights(source, options)
        return
    experiment = EXPERIMENTS[options.experiment]
    cases = experiment.cases(options.layers, options.seed)
    try:
        harness = _Harness(source, options, experiment, cases)
    except (OSError, ValueError) as error:
        sys.exit(f"reproduce: {error}{elsewhere(options.data, PROJECT)}")
    options.output.mkdir(parents=True, exist_ok=True)
    with mlflow.start_run():
        _experiment(experiment, cases, harness, options)


def _experiment(
    experiment: Experiment, cases: list[Case], harness: _Harness, options: argparse.Namespace
) -> None:
    import mlflow

    file = options.output / f"{options.experiment}.json"
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings["data"] = str(options.data.resolve())
    kept = _read(file, settings)
    rows = []
    for number, case in enumerate(cases, start=1):
        found = next((row for row in kept if case.labels.items() <= row.items()), None)
        if found is None:
            label = ", ".join(f"{key} {value}" for key, value in case.labels.items())
            print(f"== {options.experiment} {number} of {len(cases)}: {label}", flush=True)
            found = case.labels | harness.measure(case.settings, case.calibrate, experiment.texts)
        rows.append(found)
        put_text(file, json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    _log_figure(options.output / f"{options.experiment}.png", experiment.figure(rows))
    section = _section(options, experiment.question, rows, experiment.findings(rows))
    mlflow.log_text(section, f"{options.experiment}.md")
    mlflow.log_table({key: [row[key] for row in rows] for key in rows[0]}, "rows.json")
    for step, row in enumerate(rows):
        values = {_metric(k): float(v) for k, v in row.items() if k.startswith("perplexity ")}
        mlflow.log_metrics(values, step=step)
    _put_section(options.output / "RESULTS.md", options.experiment, section)
    print(section)


class _Harness:
    """A fresh model a case, the same windows for all."""

    def __init__(
        self,
        source: str,
        options: argparse.Namespace,
        experiment: Experiment,
        cases: Sequence[Case],
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from cur_modifier.data import token_windows

        depth = AutoConfig.from_pretrained(source).num_hidden_layers
        wanted = [case.settings["layers"].get("count", 0) for case in cases if case.settings]
        if max(wanted) > depth - 2:
            raise ValueError(
                f"layers {options.layers} are more than the {depth - 2} that there are between the "
                "first and the last. Lower it."
            )
        self._source = source
        self._length = options.sequence_length
        tokenizer = AutoTokenizer.from_pretrained(source)

        def windows(documents: list[str], wanted: int) -> Any:
            return token_windows(documents, tokenizer, windows=wanted, sequence_length=self._length)

        calibrate = {case.calibrate for case in cases}
        self._calibration, self._evaluation = {}, {}
        for name in sorted(calibrate | {*experiment.texts}):
            try:
                texts = domains.read(name, options.data)
                if name in calibrate:
                    self._calibration[name] = windows(texts.calibration, options.samples)
                if name in experiment.texts:
                    self._evaluation[name] = windows(texts.evaluation, options.windows)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def measure(
        self, settings: dict[str, Any] | None, calibrate: str, texts: Sequence[str]
    ) -> dict[str, Any]:
        """Ratio, perplexities and seconds of one compression."""
        import torch
        import yaml
        from llmcompressor import oneshot
        from transformers import AutoModelForCausalLM

        import cur_modifier  # noqa: F401 - registers the stage
        from cur_modifier.data import windows_dataset
        from cur_modifier.evaluate import perplexity
        from cur_modifier.modifiers.report import parameter_count

        model = AutoModelForCausalLM.from_pretrained(self._source, dtype=torch.float32)
        before = parameter_count(model)
        started = time.perf_counter()
        if settings is not None:
            ids = self._calibration[calibrate]
            stage = {"cur_modifiers": {"CURModifier": settings | {"mlflow": False}}}
            oneshot(
                model=model,
                dataset=windows_dataset(ids),
                recipe=yaml.safe_dump({"compress_stage": stage}),
                num_calibration_samples=len(ids),
            )
        seconds = time.perf_counter() - started
        row: dict[str, Any] = {"model ratio": parameter_count(model) / before}
        for text in texts:
            found = perplexity(model, self._evaluation[text], bfloat16=True)
            row[f"perplexity {text}"] = found.perplexity
        return row | {"seconds": round(seconds, 1)}


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


def _metric(key: str) -> str:
    return key.replace("perplexity ", "perplexity/")


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
) -> str:
    """One experiment in Markdown."""
    columns = list(rows[0])
    given = {"model": options.model, "data": "DATA", "output": "OUT"}
    given |= {name: getattr(options, name) for name in SETTINGS[1:]}
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
