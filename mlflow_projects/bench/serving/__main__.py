"""Speed of served models: dense, factored, quantized, and both, through vLLM's engine.

    python mlflow_projects/bench/serving --models llama-1b --variants id-0.8,id-0.5

Random weights of real shapes. The variants of a model are measured beside the dense model, and a
factored and quantized one beside the dense model in the same bits as well: one repetition of each
in turn, in engines that are all loaded, five at the most, so that whatever else slows the machine
slows them all; a speed-up is the median of the repetitions' ratios. Run it on an idle machine.

Load: reading and preparing the weights, in a process of its own, from files that the system holds
in memory. Decode: 16 tokens behind prompts of 16, at batch 8 and 32, and 64 tokens at batch 1.
Prefill: prompts of 512, at batch 1 and 8. The linear layers' share of the time is from as many
profiles, of a prefill from one; with them comes their own speed-up, to be compared with the bytes
that they no longer read. A row is written when its phase is done and kept from then on, so an
interrupted run continues.

All engines run in bfloat16, or in float32 where the processor has no units for bfloat16 and would
emulate it. Variables of OpenMP in the shell change the figures; each row says which were set.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cur_modifier.rows import Row, put_row, read_rows
from mlflow_projects.bench.serving.comparison import (
    LOAD,
    PHASES,
    measure,
    measured_together,
    with_compared,
)
from mlflow_projects.bench.serving.forms import (
    DEFAULT,
    DENSE,
    MODELS,
    VARIANTS,
    Variant,
    make_checkpoint,
    stored_ratio,
    weight_bytes,
)
from mlflow_projects.bench.serving.report import log_run, plot, table
from mlflow_projects.figures import put_figure
from mlflow_projects.processes import apart
from tools.vllm_server import vllm_program

OUTPUT = Path("bench_out/serving.json")
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
    groups = measured_together(list(todo))
    while groups:
        variants = groups.pop(0)
        print(f"{model}: {', '.join(map(str, variants))}", flush=True)
        try:
            models = {v: checkpoint(model, v, folder) for v in with_compared(variants)}
            # Once, and not while engines are measured: it reads the files.
            sizes = {
                variant: {
                    "weight_bytes": weight_bytes(models[variant]),
                    "dense_bytes": weight_bytes(models[DENSE]),
                    "projection_bytes_ratio": stored_ratio(models[variant], models[DENSE]),
                }
                for variant in variants
            }
            with closing(measure(models, {v: [*todo[v]] for v in variants}, options)) as rows:
                for variant, row in rows:
                    row |= {
                        "model": model,
                        "dtype": options.dtype,
                        **asdict(variant),
                        **sizes[variant],
                        "repetitions": options.repetitions,
                        "environment": openmp_settings(),
                    }
                    put_row(options.output, row, key)
                    todo[variant].remove((row["phase"], row["batch"]))
                    print(f"    {row_in_a_line(variant, row)}", flush=True)
        except (EOFError, OSError, RuntimeError, ValueError) as error:
            print(f"    failed: {error!r}\n{_ends(folder)}", flush=True)
            if len(variants) > 1:  # so that one stops no other
                groups[:0] = [[variant] for variant in variants if todo[variant]]
                continue
            failed += [f"{model} {variant}" for variant in variants]
        for variant in variants:
            if variant.form != DENSE.form:  # the others may be compared with again
                shutil.rmtree(folder / str(variant), ignore_errors=True)
    return failed


def checkpoint(model: str, variant: Variant, folder: Path) -> Path:
    """The folder of a checkpoint below ``folder``, made where it is not there yet."""
    directory = folder / str(variant)
    if not directory.exists():
        print(f"    making {model}, {variant}", flush=True)
        unfinished = folder / f"unfinished-{variant}"
        apart(make_checkpoint, MODELS[model], variant, unfinished)  # whose memory engines need
        unfinished.rename(directory)
    return directory


def row_in_a_line(variant: Variant, row: Row) -> str:
    """What was measured of a variant in one phase."""
    name = f"{variant!s:<12} {row['phase']:>7} {row['batch']:>2}: "
    if row["phase"] == LOAD[0]:
        return f"{name}{row['seconds']:8.1f} s, dense {row['dense_seconds']:.1f} s"
    line = (
        f"{name}{row['tokens_per_second']:8.1f} tokens/s, {row['speedup_over_dense']:.2f} times "
        f"dense, linear layers {row['linear_speedup']:.2f}"
    )
    if (ratio := row["speedup_over_quantized"]) is not None:
        line += f"; {ratio:.2f} times dense {row['quantization']}"
    return line


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
