"""Perplexity at a given size, ours beside the published methods (protocol P of this repository).

    python mlflow_projects/bench/quality --methods svd-llm,id-gram --ratios 0.8,0.6

SmolLM2-135M-Instruct, all seven projections of all layers. Perplexity in float32 on the first 24
windows of 1024 tokens of WikiText-2's test text and of C4's documents 500 to 999; calibration on 64
windows of WikiText-2's validation text or of C4's documents 0 to 499. Ratio = parameters stored
after ÷ before, over those projections. A row that exists is kept, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_projects.bench.quality.measure import Job, measure
from mlflow_projects.bench.quality.methods import METHODS
from mlflow_projects.bench.quality.protocol import CALIBRATIONS, DATA, RATIOS, missing_files
from mlflow_projects.bench.quality.results import format_tables, key, plot
from mlflow_projects.processes import apart

if TYPE_CHECKING:
    from cur_modifier.rows import Row

OUTPUT = Path("bench_out/quality.json")
HELD_OUT_OUTPUT = Path("bench_out/quality_held_out.json")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without loading a model."""
    parser = argparse.ArgumentParser(
        prog="quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", type=_names("method", METHODS), default=list(METHODS), help=", ".join(METHODS)
    )
    parser.add_argument("--ratios", type=_ratios, default=list(RATIOS), help="between 0 and 1")
    parser.add_argument(
        "--calibrations",
        type=_names("calibration", CALIBRATIONS),
        default=list(CALIBRATIONS),
        help=", ".join(CALIBRATIONS),
    )
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of the texts [{DATA}]")
    parser.add_argument("--model", help="directory of another model; needs --output")
    parser.add_argument("--output", type=Path, help=f"JSON file of the rows [{OUTPUT}]")
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="to choose hyper-parameters: evaluate on 8 windows of the second half of the "
        f"validation text, in bfloat16, into {HELD_OUT_OUTPUT}",
    )
    parser.add_argument("--again", action="store_true", help="measure rows that exist once more")
    options = parser.parse_args(arguments)

    missing = missing_files(options.data)
    if missing:
        parser.error(
            f"--data {options.data} lacks {', '.join(missing)}: WikiText-2's raw test and "
            "validation texts, and the first 1000 documents of C4's English training set, one JSON "
            "object with the field `text` a line. Put them there, or name the folder that has them "
            "(make bench-quality DATA=FOLDER)."
        )
    if options.model and not options.output:
        parser.error(
            f"--model {options.model} without --output: its rows would mix with SmolLM2's. Name a "
            "file for them."
        )
    if options.model and not (Path(options.model) / "config.json").is_file():
        parser.error(f"--model {options.model} is not a model's directory: no config.json in it.")
    options.output = options.output or (HELD_OUT_OUTPUT if options.held_out else OUTPUT)
    options.settings = {
        "model": str(Path(options.model).resolve()) if options.model else None,
        "held_out": options.held_out or None,
    }
    from cur_modifier.rows import read_rows, refuse_others

    try:
        refuse_others(options.output, read_rows(options.output, key), options.settings)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, one row at a time, and print the tables. 1 where a row failed."""
    options = parse(arguments)
    # Inherited by the processes that measure: there, bars and warnings are enough.
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cur_modifier.rows import read_rows
    from mlflow_projects.figures import put_figure

    known = set() if options.again else {key(row) for row in read_rows(options.output, key)}
    wanted = jobs(options)
    todo = [job for job in wanted if (job.method, job.ratio, job.calibration) not in known]
    print(f"{len(todo)} rows to measure, {len(wanted) - len(todo)} in {options.output} already")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".statistics-") as folder:
        try:
            apart = [replace(job, kept=Path(folder)) for job in todo]
            failed = measure_all(apart, options.output, options.settings)
        except KeyboardInterrupt:
            print("Interrupted. The rows so far are kept: the same command continues.")
            return 130
    rows = read_rows(options.output, key)
    if rows:
        figure = options.output.with_suffix(".png")
        put_figure(figure, plot(rows, list(METHODS)))
        print(f"\n{format_tables(rows, list(METHODS))}\n\nIn {options.output} and {figure}")
    if failed:
        print(f"Failed, and tried again by the same command: {'; '.join(map(str, failed))}")
    return 1 if failed else 0


def measure_all(todo: Sequence[Job], output: Path, settings: Row) -> list[Job]:
    """Measure one row after another into ``output``, with the settings that are not the default;
    those that failed."""
    from cur_modifier.rows import put_row

    failed = []
    given = {name: value for name, value in settings.items() if value is not None}
    for number, job in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {job}", flush=True)
        try:
            row = apart(measure, job)
        except RuntimeError as error:  # the others are measured all the same
            failed.append(job)
            print(f"    failed: {error}", flush=True)
            continue
        put_row(output, row | given, key)
        figures = ", ".join(f"{k} {v:.2f}" for k, v in row.items() if k.startswith("ppl_"))
        print(
            f"    {figures}, stored {row['stored_ratio']:.4f}, {row['seconds']:.0f} s, "
            f"{row['peak_rss_bytes'] / 1e9:.1f} GB",
            flush=True,
        )
    return failed


def jobs(options: argparse.Namespace) -> list[Job]:
    """Every row that the options ask for; one for a method with its own ratio."""
    return [
        Job(method, ratio, calibration, options.data, options.model, options.held_out)
        for calibration in options.calibrations
        for method in options.methods
        for ratio in ([None] if METHODS[method].own_ratio else options.ratios)
    ]


def _names(what: str, known: Collection[str]) -> Callable[[str], list[str]]:
    def parse_names(text: str) -> list[str]:
        names = _split(text)
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {', '.join(unknown) or repr(text)}; choose from "
                f"{', '.join(known)}."
            )
        return names

    return parse_names


def _ratios(text: str) -> list[float]:
    ratios = []
    for item in _split(text) or [text]:
        try:
            ratio = float(item)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{item!r} is not a number; write ratios as 0.9,0.8."
            ) from None
        if not 0 < ratio < 1:
            raise argparse.ArgumentTypeError(
                f"ratio {item} is outside (0, 1): it is parameters stored after ÷ before. "
                "0.8 keeps 80 % of them."
            )
        ratios.append(ratio)
    return list(dict.fromkeys(ratios))


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(item for item in re.split(r"[,\s]+", text) if item))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what it started
    sys.exit(main())
