"""Variants in turn: which are measured together, and the speed of each beside dense."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from cur_modifier.rows import Row
from mlflow_projects.bench.serving.forms import DENSE, Variant
from tools.vllm_server import CPU_SETTINGS, vllm_program

__all__ = [
    "LOAD",
    "MOST_ENGINES",
    "PHASES",
    "compared",
    "engine",
    "measure",
    "measured_together",
    "with_compared",
]

LOAD = ("load", 1)
PHASES = [LOAD, ("decode", 1), ("decode", 8), ("decode", 32), ("prefill", 1), ("prefill", 8)]
MOST_ENGINES = 5  # at once: of the larger model they take 18 GB


def measured_together(variants: list[Variant]) -> list[list[Variant]]:
    """The variants in groups whose engines are loaded at once, with what they are compared with."""
    groups: list[list[Variant]] = []
    for variant in variants:
        if groups and len(with_compared([*groups[-1], variant])) <= MOST_ENGINES:
            groups[-1].append(variant)
        else:
            groups.append([variant])
    return groups


def with_compared(variants: Iterable[Variant]) -> list[Variant]:
    """The variants, behind what they are compared with."""
    found = [DENSE]
    for variant in variants:
        found += [*compared(variant), variant]
    return list(dict.fromkeys(found))


def compared(variant: Variant) -> list[Variant]:
    """What a variant is measured beside: dense, and dense in the same bits where that differs."""
    quantized = replace(DENSE, quantization=variant.quantization)
    return [DENSE] if quantized in (DENSE, variant) else [DENSE, quantized]


def measure(
    models: Mapping[Variant, Path],
    phases: Mapping[Variant, list[tuple[str, int]]],
    options: argparse.Namespace,
) -> Generator[tuple[Variant, Row], None, None]:
    """A row for each variant and each of its phases, when all have done that phase."""

    def those_with(phase: tuple[str, int]) -> list[Variant]:
        return [variant for variant, own in phases.items() if phase in own]

    if wanted := those_with(LOAD):
        yield from compare_loading(
            {v: models[v] for v in with_compared(wanted)},
            wanted,
            options.dtype,
            options.repetitions,
        )
    speeds = [phase for phase in PHASES if phase != LOAD and those_with(phase)]
    if not speeds:
        return
    with ExitStack() as stack:
        engines, said = {}, {}
        for variant in with_compared(v for phase in speeds for v in those_with(phase)):
            print(f"    starting {variant}", flush=True)
            started = engine(models[variant], options.dtype)
            engines[variant], said = stack.enter_context(started)
        for phase in speeds:
            wanted = those_with(phase)
            asked = {v: engines[v] for v in with_compared(wanted)}
            for variant, row in compare(asked, wanted, *phase, options.repetitions):
                yield variant, row | said


def compare_loading(
    models: Mapping[Variant, Path], wanted: list[Variant], dtype: str, repetitions: int
) -> Iterator[tuple[Variant, Row]]:
    """The checkpoints in turn, each in a process that ends when the weights are ready."""
    seconds: dict[Variant, list[float]] = {variant: [] for variant in models}
    for _ in range(repetitions):
        for variant, model in models.items():
            with engine(model, dtype, only_load=True) as (_, loaded):
                seconds[variant].append(loaded["load_seconds"])
    speeds = {variant: [1 / taken for taken in own] for variant, own in seconds.items()}
    for variant in wanted:
        yield (
            variant,
            {
                "phase": LOAD[0],
                "batch": LOAD[1],
                "tokens_per_second": None,
                "seconds": median(seconds[variant]),
                "dense_seconds": median(seconds[DENSE]),
                **speedups(variant, speeds),
                "linear_share": None,
                "vllm": loaded["vllm"],
            },
        )


def compare(
    engines: Mapping[Variant, Connection],
    wanted: list[Variant],
    phase: str,
    batch: int,
    repetitions: int,
) -> Iterator[tuple[Variant, Row]]:
    """The engines in turn, one phase."""
    for each in engines.values():  # warms up
        ask(each, "generate", batch, 16, 2)
    measured: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in engines}
    profiles: dict[Variant, list[dict[str, float]]] = {v: [] for v in [DENSE, *wanted]}
    profiled = 1 if phase == "prefill" else repetitions  # it is long, and of equal parts
    for method, found, times in (
        ("measure", measured, repetitions),
        ("profile", profiles, profiled),
    ):
        for _ in range(times):
            for variant, own in found.items():
                own.append(ask(engines[variant], method, phase, batch))
    speeds = {v: [one["tokens_per_second"] for one in own] for v, own in measured.items()}
    dense = profiles[DENSE]
    for variant in wanted:
        own = profiles[variant]
        yield (
            variant,
            {
                "phase": phase,
                "batch": batch,
                "tokens_per_second": median(speeds[variant]),
                **speedups(variant, speeds),
                "seconds_to_first_token": median(one["first_token"] for one in measured[variant]),
                "linear_share": median(one["linear"] / one["whole"] for one in own),
                "dense_linear_share": median(one["linear"] / one["whole"] for one in dense),
                "linear_speedup": median(
                    b["linear"] / a["linear"] for a, b in zip(own, dense, strict=True)
                ),
                "peak_rss_bytes": own[-1]["peak_rss_bytes"],
                "dense_peak_rss_bytes": dense[-1]["peak_rss_bytes"],
            },
        )


def speedups(variant: Variant, speeds: Mapping[Variant, list[float]]) -> Row:
    """A variant's speed over that of dense, and over that of dense in the same bits where there is
    one: medians of the repetitions' ratios, and their ranges."""
    row: Row = {"speedup_over_quantized": None}
    for name, other in zip(("dense", "quantized"), compared(variant), strict=False):
        ratios = [a / b for a, b in zip(speeds[variant], speeds[other], strict=True)]
        row[f"speedup_over_{name}"] = median(ratios)
        row[f"speedup_over_{name}_range"] = [min(ratios), max(ratios)]
    return row


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
