"""Bytes on disk against perplexity: quantized alone, and made smaller and quantized.

    python mlflow_projects/bench/stacking.py --ways id,prune --ratios 0.9,0.8 --bits 8,4,3,2

Each point is a recipe run by ``cur_modifier.compress``: compressed in bfloat16 (in float32 where
that is emulated), saved in bfloat16, and the checkpoint loaded with ``from_pretrained`` in float32
for its perplexity. SmolLM2-135M-Instruct, calibrated on the first 64 windows of 1024 tokens of
WikiText-2's validation text, evaluated on the first 24 of its test text. *Bytes* are those of the
safetensors files: factors or weights, scales, and the embedding in bfloat16 (57 MB, in every
point). GPTQ alone takes groups of 64, the largest that divide every width, and so do models from
which neurons are removed, 64 at a time; in factored models groups divide the ranks, and are 32.

A point that exists is kept, so an interrupted run continues. The recipe and the log of every point
stay beside the results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cur_modifier.rows import Row, put_row, read_rows, refuse_others
from mlflow_projects.bench.quality.methods import BUDGET, ID, PRUNE_FREE, gptq
from mlflow_projects.bench.quality.protocol import DATA, WIKI_TEST, WIKI_VALID, model_directory
from mlflow_projects.figures import BLUE, PALETTE, label_within_decades, put_figure

OUTPUT = Path("bench_out/stacking.json")
DENSE_GROUP, FACTORED_GROUP = 64, 32
WAYS = {"id": "row ID", "prune": "neurons removed"}  # to make a model smaller, as plots say it
SAMPLES, LENGTH = 64, 1024  # windows of the protocol, and their tokens


@dataclass(frozen=True)
class Point:
    """``ratio`` and ``way`` None leave the sizes alone, ``bits`` None is not quantized."""

    ratio: float | None
    bits: int | None
    way: str | None = None

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale."""
        if self.bits is None:
            return None
        return FACTORED_GROUP if self.way == "id" else DENSE_GROUP

    def __str__(self) -> str:
        smaller = "dense" if self.ratio is None else f"{self.way}-{self.ratio:g}"
        return smaller if self.bits is None else f"{smaller}-{self.bits}bit"

    def recipe(self) -> dict[str, Any]:
        """The stages of the point, as in ``recipes/``."""
        stage: dict[str, Any] = {}
        if self.way == "prune":
            fields = {"budget": {"ratio": self.ratio}, "multiple_of": DENSE_GROUP, "mlflow": False}
            stage["prune_modifiers"] = {"IDPruningModifier": PRUNE_FREE | fields}
        if self.way == "id":
            cur = ID | {
                "rank": {"ratio": self.ratio} | BUDGET,
                "multiple_of": FACTORED_GROUP,
                "mlflow": False,
            }
            stage["cur_modifiers"] = {"CURModifier": cur}
        if self.bits is not None and self.group_size is not None:
            fields = gptq(self.bits, self.group_size)
            stage["quantization_modifiers"] = {"GPTQModifier": fields}
        return {"compress_stage": stage}


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, one point at a time; table and plot. 1 where a point failed."""
    options = parse(arguments)
    points = [Point(None, None)]
    points += [Point(None, bits) for bits in options.bits]
    points += [
        Point(ratio, bits, way)
        for way in options.ways
        for bits in options.smaller_bits
        for ratio in options.ratios
    ]
    known = {point_of(row) for row in read_rows(options.output, point_of)}
    todo = [point for point in points if point not in known]
    print(f"{len(todo)} points to measure, {len(points) - len(todo)} in {options.output} already")
    given = {name: value for name, value in options.settings.items() if value is not None}
    failed = []
    for number, point in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {point}", flush=True)
        try:
            row = measure(point, options)
        except RuntimeError as error:  # the others are measured all the same
            failed.append(point)
            print(f"    failed: {error}", flush=True)
            continue
        put_row(options.output, row | given, point_of)
        print(f"    {row['bytes'] / 1e6:.1f} MB, perplexity {row['ppl_wikitext']:.2f}", flush=True)
    rows = read_rows(options.output, point_of)
    if rows:
        figure = options.output.with_suffix(".png")
        put_figure(figure, plot(rows))
        print(f"\n{table(rows)}\n\nIn {options.output} and {figure}")
    return 1 if failed else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked before anything is compressed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=_bits, default=[8, 4, 3, 2], help="of GPTQ alone")
    parser.add_argument(
        "--ways", type=_ways, default=list(WAYS), help=f"to make it smaller: {', '.join(WAYS)}"
    )
    parser.add_argument("--ratios", type=_ratios, default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--smaller-bits", type=_bits, default=[4], help="of GPTQ behind that")
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of the texts [{DATA}]")
    parser.add_argument("--model", help="directory of another; needs --output")
    parser.add_argument("--output", type=Path, help=f"JSON file of the points [{OUTPUT}]")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help=f"calibration windows [{SAMPLES}]"
    )
    parser.add_argument(
        "--sequence-length", type=int, default=LENGTH, help=f"tokens of each [{LENGTH}]"
    )
    options = parser.parse_args(arguments)
    missing = [file for file in (WIKI_VALID, WIKI_TEST) if not (options.data / file).is_file()]
    if missing:
        parser.error(
            f"--data {options.data} lacks {', '.join(missing)}: put WikiText-2's raw texts there, "
            "or name the folder that has them (make bench-stacking DATA=FOLDER)."
        )
    other = options.model or (options.samples, options.sequence_length) != (SAMPLES, LENGTH)
    if other and not options.output:
        parser.error(
            "another model or calibration without --output: its points would mix with those of "
            "SmolLM2 under the protocol. Name a file for them."
        )
    options.output = options.output or OUTPUT
    options.settings = {
        "model": str(Path(options.model).resolve()) if options.model else None,
        "samples": options.samples if options.samples != SAMPLES else None,
        "sequence_length": options.sequence_length if options.sequence_length != LENGTH else None,
    }
    try:
        refuse_others(options.output, read_rows(options.output, point_of), options.settings)
    except ValueError as error:
        parser.error(str(error))
    return options


def measure(point: Point, options: argparse.Namespace) -> Row:
    """Run the point's recipe in processes of its own.

    Raises:
        RuntimeError: it failed; its log says why.
    """
    import yaml

    kept = options.output.with_suffix("")
    kept.mkdir(parents=True, exist_ok=True)
    model, test = model_directory(options.model), str(options.data / WIKI_TEST)
    log = kept / f"{point}.log"
    if point == Point(None, None):
        evaluate = [sys.executable, "-m", "cur_modifier.evaluate", model, "--text", test]
        printed = json.loads(_run(evaluate, log))
        found = printed | {"bytes": bfloat16_bytes(model), "seconds": 0}
    else:
        recipe = kept / f"{point}.yaml"
        recipe.write_text(yaml.safe_dump(point.recipe(), sort_keys=False))
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, result = Path(folder) / "checkpoint", Path(folder) / "result.json"
            command = [
                *(sys.executable, "-m", "cur_modifier.compress", str(recipe)),
                *("--model", model, "--calibrate", str(options.data / WIKI_VALID)),
                *("--evaluate", test, "--output", str(checkpoint), "--results", str(result)),
                *("--samples", str(options.samples)),
                *("--sequence-length", str(options.sequence_length)),
            ]
            _run(command, log)
            (found,) = json.loads(result.read_text())
    return asdict(point) | {
        "group_size": point.group_size,
        "bytes": found["bytes"],
        "ppl_wikitext": found["perplexity"],
        "seconds": found["seconds"],
    }


def _run(command: list[str], log: Path) -> str:
    """What a command printed; also in the log, with its messages."""
    # llm-compressor logs to standard output, among what a command prints.
    quiet = os.environ | {"LLM_COMPRESSOR_LOG_LEVEL": "ERROR"}
    with log.open("w") as messages:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=messages, env=quiet, check=False
        )
        printed = done.stdout.decode(errors="replace")
        messages.write(printed)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}; see {log}")
    return printed


def bfloat16_bytes(model: str) -> int:
    """Bytes of the tensors in a checkpoint's safetensors files, at 16 bits a number."""
    from safetensors import safe_open

    numbers = 0
    for path in Path(model).glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        numbers += sum(math.prod(shape) for shape in shapes)
    return 2 * numbers


def point_of(row: Row) -> Point:
    """What a row measures. Rows of before there were two ways have none: theirs is ``id``."""
    return Point(row["ratio"], row["bits"], row.get("way", "id") if row["ratio"] else None)


def table(rows: Sequence[Row]) -> str:
    """From large to small."""
    lines = [f"{'':<14}{'MB':>8}{'perplexity':>12}{'seconds':>9}"]
    for row in sorted(rows, key=lambda row: -row["bytes"]):
        name = str(point_of(row))
        size, perplexity = row["bytes"] / 1e6, row["ppl_wikitext"]
        lines.append(f"{name:<14}{size:>8.1f}{perplexity:>12.2f}{row['seconds']:>9.0f}")
    return "\n".join(lines)


def plot(rows: Sequence[Row]) -> Any:
    """Perplexity over megabytes, both on log scales, a line for each way.

    What has more than ten times the least perplexity is no model any more: such a point stands at
    the upper edge, with its figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    # Ways differ by marker and line as well.
    looks = (itertools.cycle(each) for each in (PALETTE[1:], "s^Dv", ("--", ":", "-.")))
    styles = zip(*looks, strict=True)
    ways: dict[str, list[Row]] = {}
    model = Path(rows[0].get("model") or "SmolLM2-135M").name
    for row in sorted(rows, key=lambda row: row["bytes"]):
        if row["ratio"] is not None:
            way = WAYS[point_of(row).way or "id"]
            way += "" if row["bits"] is None else f" + GPTQ, {row['bits']} bits"
        else:
            way = "dense, bfloat16" if row["bits"] is None else "GPTQ alone"
        ways.setdefault(way, []).append(row)
    highest = 10 * min(row["ppl_wikitext"] for row in rows)
    for way, found in ways.items():
        colour, marker, line = {
            "dense, bfloat16": ("black", "*", "-"),
            "GPTQ alone": (BLUE, "o", "-"),
        }.get(way) or next(styles)
        size = [row["bytes"] / 1e6 for row in found]
        height = [min(row["ppl_wikitext"], highest) for row in found]
        axes.plot(size, height, line, color=colour, marker=marker, label=way)
        for x, y, row in zip(size, height, found, strict=True):
            smaller = row["ratio"] is not None
            label = f"{row['ratio']:g}" if smaller else f"{row['bits']} bits"
            if y < row["ppl_wikitext"]:
                label += f": {row['ppl_wikitext']:.0f} ↑"
            if smaller or row["bits"] is not None:
                axes.annotate(
                    label,
                    (x, y),
                    xytext=(-5, -5) if smaller else (5, 5),
                    ha="right" if smaller else "left",
                    va="top" if smaller else "bottom",
                    textcoords="offset points",
                )
    axes.set(
        xlabel="checkpoint on disk / MB",
        ylabel="perplexity on WikiText-2",
        xscale="log",
        yscale="log",
        title=f"{model} at equal bytes",
    )
    axes.margins(x=0.1, y=0.08)
    for axis in (axes.xaxis, axes.yaxis):
        label_within_decades(axis)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def _bits(text: str) -> list[int]:
    return [
        _number(item, int, "a number of bits between 1 and 8", 0, 9) for item in text.split(",")
    ]


def _ways(text: str) -> list[str]:
    for item in text.split(","):
        if item not in WAYS:
            raise argparse.ArgumentTypeError(f"{item!r} is none of {', '.join(WAYS)}.")
    return text.split(",")


def _ratios(text: str) -> list[float]:
    return [_number(item, float, "a ratio between 0 and 1", 0, 1) for item in text.split(",")]


def _number(item: str, kind: type, what: str, low: float, high: float) -> Any:
    try:
        value = kind(item)
    except ValueError:
        value = None
    if value is None or not low < value < high:
        raise argparse.ArgumentTypeError(f"{item!r} is not {what}.")
    return value


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what it started
    sys.exit(main())
