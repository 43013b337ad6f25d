"""Speed of served models: dense, factored, quantized, and both, through vLLM's engine.

    python mlflow_projects/bench/serving --models llama-1b --variants id-0.8,id-0.5

Random weights of real shapes. Every variant is measured beside the dense model: one repetition of
each in turn, in engines that are both loaded, so that whatever else slows the machine slows both;
the speed-up is the median of the repetitions' ratios. Run it on an idle machine.

Load: reading and preparing the weights, in a process of its own, from files that the system holds
in memory. Decode: 16 tokens behind prompts of 16, at batch 8 and 32, and 64 tokens at batch 1.
Prefill: prompts of 512, at batch 1 and 8. The linear layers' share of the time is from as many
profiles; with them comes their own speed-up, to be compared with the bytes that they no longer
read. A row that exists is kept, so an interrupted run continues.

Both engines run in bfloat16, or in float32 where the processor has no units for bfloat16 and would
emulate it. Variables of OpenMP in the shell change the figures; each row says which were set.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a folder: let its modules find each other by the package's name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for files.py
sys.path.insert(1, str(Path(__file__).resolve().parents[3] / "tools"))

from files import Row, put_figure, put_row, read_rows
from vllm_server import CPU_SETTINGS, vllm_program

from serving.forms import (
    DEFAULT,
    DENSE,
    MODELS,
    VARIANTS,
    Variant,
    make_checkpoint,
    stored_ratio,
    weight_bytes,
)
from serving.report import log_run, plot, table

OUTPUT = Path("bench_out/serving.json")
LOAD = ("load", 1)
PHASES = [LOAD, ("decode", 1), ("decode", 8), ("decode", 32), ("prefill", 1), ("prefill", 8)]
DTYPES = ("bfloat16", "float32")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=_names(MODELS), default=list(MODELS), help=", ".join(MODELS)
    )
    parser.add_argument(
        "--variants", type=_names(VARIANTS), default=DEFAULT, help=", ".join(VARIANTS)
    )
    named = {f"{phase}-{batch}": (phase, batch) for phase, batch in PHASES}
    parser.add_argument("--phases", type=_names(named), default=list(named), help=", ".join(named))
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"JSON file [{OUTPUT}]")
    parser.add_argument("--no-mlflow", action="store_true", help="log nothing")
    options = parser.parse_args(arguments)
    options.phases = [named[name] for name in options.phases]
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions}: at least 1 is needed.")
    try:
        read_rows(options.output, key)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, print the table, draw the plot. 1 where a variant failed."""
    options = parse(arguments)
    vllm_program()  # or say now how to get one
    rows = read_rows(options.output, key)
    known = {key(row) for row in rows}
    if options.dtype == "auto":
        import torch

        from cur_modifier.precision import computed_dtype

        options.dtype = str(computed_dtype(torch.bfloat16)).removeprefix("torch.")
    failed = []
    for model in options.models:
        missing = {
            name: [
                phase
                for phase in options.phases
                if (model, options.dtype, *asdict(VARIANTS[name]).values(), *phase) not in known
            ]
            for name in options.variants
        }
        todo = {VARIANTS[name]: phases for name, phases in missing.items() if phases}
        if not todo:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            try:
                failed += measure_model(model, todo, folder, options)
            except KeyboardInterrupt:
                print("Interrupted. The rows so far are kept: the same command continues.")
                return 130
    rows = read_rows(options.output, key)
    if rows:
        figure = options.output.with_suffix(".png")
        put_figure(figure, plot(rows))
        print(f"\n{table(rows)}\n\nIn {options.output} and {figure}")
        if not options.no_mlflow:
            log_run(rows, options.output, figure)
    if failed:
        print(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


def measure_model(
    model: str,
    todo: dict[Variant, list[tuple[str, int]]],
    folder: Path,
    options: argparse.Namespace,
) -> list[str]:
    """Measure phases of variants of a model beside the dense one; which of them failed."""
    failed = []
    dense = folder / "dense"
    print(f"{model}: making the dense checkpoint", flush=True)
    make_checkpoint(model, DENSE, dense)
    for number, (variant, phases) in enumerate(todo.items(), start=1):
        print(f"[{number}/{len(todo)}] {model}, {variant}", flush=True)
        directory = folder / str(variant)
        try:
            make_checkpoint(model, variant, directory)
            rows = []
            if LOAD in phases:
                rows.append(compare_loading(directory, dense, options.dtype, options.repetitions))
            if speeds := [phase for phase in phases if phase != LOAD]:
                with (
                    engine(directory, options.dtype) as (own, said),
                    engine(dense, options.dtype) as (beside, _),
                ):
                    found = compare(own, beside, speeds, options.repetitions)
                rows += [row | said for row in found]
        except (EOFError, OSError, RuntimeError, ValueError) as error:
            failed.append(f"{model} {variant}")
            print(f"    failed: {error!r}\n{_ends(folder)}", flush=True)
            continue
        for row in rows:
            row |= {
                "model": model,
                "dtype": options.dtype,
                **asdict(variant),
                "weight_bytes": weight_bytes(directory),
                "dense_bytes": weight_bytes(dense),
                "projection_bytes_ratio": stored_ratio(directory, dense),
                "repetitions": options.repetitions,
                "environment": openmp_settings(),
            }
            put_row(options.output, row, key)
            print(f"    {described(row)}", flush=True)
        shutil.rmtree(directory)
    return failed


def described(row: Row) -> str:
    """A row in a line."""
    name = f"{row['phase']:>7} {row['batch']:>2}: "
    if row["phase"] == LOAD[0]:
        return f"{name}{row['seconds']:8.1f} s, dense {row['dense_seconds']:.1f} s"
    return (
        f"{name}{row['tokens_per_second']:8.1f} tokens/s, {row['speedup_over_dense']:.2f} times "
        f"dense, linear layers {row['linear_speedup']:.2f}"
    )


def compare_loading(own: Path, dense: Path, dtype: str, repetitions: int) -> Row:
    """Both checkpoints in turn, each in a process that ends when the weights are ready."""
    pairs = []
    for _ in range(repetitions):
        seconds = []
        for model in (own, dense):
            with engine(model, dtype, only_load=True) as (_, loaded):
                seconds.append(loaded["load_seconds"])
        pairs.append(seconds)
    ratios = [theirs / mine for mine, theirs in pairs]
    return {
        "phase": LOAD[0],
        "batch": LOAD[1],
        "tokens_per_second": None,
        "seconds": median(mine for mine, _ in pairs),
        "dense_seconds": median(theirs for _, theirs in pairs),
        "speedup_over_dense": median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "linear_share": None,
        "vllm": loaded["vllm"],
    }


def compare(
    own: Connection, dense: Connection, phases: list[tuple[str, int]], repetitions: int
) -> list[Row]:
    """Both engines in turn, phase by phase."""
    rows = []
    for phase, batch in phases:
        pairs: list[tuple[dict[str, float], dict[str, float]]] = []
        for which in (own, dense):  # warms up
            ask(which, "generate", batch, 16, 2)
        for _ in range(repetitions):
            pair = [ask(which, "measure", phase, batch) for which in (own, dense)]
            pairs.append((pair[0], pair[1]))
        profiles = [
            tuple(ask(which, "profile", phase, batch) for which in (own, dense))
            for _ in range(repetitions)
        ]
        speeds = [mine["tokens_per_second"] for mine, _ in pairs]
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
        rows.append(
            {
                "phase": phase,
                "batch": batch,
                "tokens_per_second": median(speeds),
                "speedup_over_dense": median(ratios),
                "speedup_range": [min(ratios), max(ratios)],
                "seconds_to_first_token": median(mine["first_token"] for mine, _ in pairs),
                "linear_share": median(mine["linear"] / mine["whole"] for mine, _ in profiles),
                "dense_linear_share": median(a["linear"] / a["whole"] for _, a in profiles),
                "linear_speedup": median(a["linear"] / mine["linear"] for mine, a in profiles),
                "peak_rss_bytes": profiles[-1][0]["peak_rss_bytes"],
                "dense_peak_rss_bytes": profiles[-1][1]["peak_rss_bytes"],
            }
        )
    return rows


def ask(engine: Connection, method: str, *arguments: Any) -> dict[str, float]:
    """What an engine answers."""
    engine.send((method, arguments))
    return engine.recv()


@contextmanager
def engine(
    model: Path, dtype: str, *, only_load: bool = False
) -> Iterator[tuple[Connection, dict[str, Any]]]:
    """A vLLM engine in a process of the serving environment, and what it said first; with
    ``only_load`` that is all that there is. Its log is beside the model.

    Raises:
        EOFError: it ended before it was ready, or where the connection is used, before it answered.
    """
    python = vllm_program().with_name("python")
    script = Path(__file__).with_name("engine.py")
    log = model.parent / f"{model.name}.log"
    ours, theirs = Pipe()
    with log.open("wb") as output, ours:
        process = subprocess.Popen(
            [str(python), str(script), str(model), dtype, str(theirs.fileno())]
            + ["load"] * only_load,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=CPU_SETTINGS | dict(os.environ),
            pass_fds=[theirs.fileno()],
        )
        theirs.close()  # the engine holds the only other one, so its end ends the wait
        try:
            yield ours, ours.recv()
        finally:
            process.terminate()
            process.wait()


def _ends(folder: Path) -> str:
    """How the logs of the engines end."""
    logs = sorted(folder.glob("*.log"))
    return "\n".join(f"{log.name}: ...{log.read_text(errors='replace')[-2000:]}" for log in logs)


def key(row: Row) -> tuple[Any, ...]:
    """What a row measures."""
    return tuple(
        row[k] for k in ("model", "dtype", "form", "ratio", "quantization", "phase", "batch")
    )


def openmp_settings() -> dict[str, str]:
    """What the shell tells the threads, and the engines inherit: with OMP_WAIT_POLICY=PASSIVE one
    decoded a quarter fewer tokens."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "GOMP_", "KMP_"))}


def _names(known: Any) -> Any:
    def parse_names(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"unknown {', '.join(unknown) or repr(text)}; choose from {', '.join(known)}."
            )
        return names

    return parse_names


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends what it started
    sys.exit(main())
