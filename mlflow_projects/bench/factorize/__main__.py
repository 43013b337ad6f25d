"""Time and error of factoring one weight: every selection in every form, and what others have.

    python mlflow_projects/bench/factorize --shapes 4096x4096,1024x4096 --rank 256

Each weight has the singular values ``i^-0.5`` and random orthonormal singular vectors; the inputs
are uncorrelated, with log-normal scales. *reference* is our own writing of the procedure that the
CURing code follows: WANDA scores, a float64 randomized SVD with two power iterations, a Python loop
for DEIM on either side, two float64 pseudo-inverses. Beside it stand a full SVD cut off, LAPACK's
pivoted QR and SciPy's interpolative decompositions, all of which look at the weight alone. Every
method runs in this process on the same weight, and the fastest of its repeats counts; there are
fewer where they take long.

*error* is ``‖W − Ŵ‖_F / ‖W‖_F``, *best* the smallest that any factors of the rank can have, and
*activation* the same in the norm of the inputs. Rows, table and figure are one MLflow run.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from cur_modifier.linalg import gram_norm
from cur_modifier.rows import Row, put_rows
from mlflow_projects.arguments import check_output, count, names
from mlflow_projects.bench.factorize.methods import METHODS, REFERENCE, product
from mlflow_projects.bench.factorize.report import HEADER, line, log_run, plot
from mlflow_projects.figures import put_figure

PROJECT = Path(__file__).resolve().parent
LLAMA_8B = "4096x4096,1024x4096,14336x4096,4096x14336"  # q and o, k and v, gate and up, down
REPEAT_SECONDS = 20.0  # no further repeat of a method that has taken this long


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write and log."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)  # torch.svd_lowrank in the reference takes no generator
    print(HEADER)
    rows = []
    with threadpool_limits(options.threads):  # SciPy's
        for shape in options.shapes:
            rows += compare(shape, options)
            put_rows(options.output, rows)  # an interruption costs the shape it falls in
    figure = options.output.with_suffix(".png")
    put_figure(figure, plot(rows))
    if not options.no_mlflow:
        log_run(rows, options.output, figure)
    print(f"In {options.output} and {figure}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked before anything is factored."""
    parser = argparse.ArgumentParser(
        prog="factorize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=parse_shapes, default=LLAMA_8B, help=f"[{LLAMA_8B}]")
    parser.add_argument(
        "--methods", type=parse_methods, default="all", help=f"all, or {', '.join(METHODS)}"
    )
    parser.add_argument("--rank", type=count, default=256)
    parser.add_argument("--repeats", type=count, default=3, help="at most")
    parser.add_argument(
        "--threads", type=count, default=1, help="more of them burn CPU time waiting for each other"
    )
    parser.add_argument("--output", type=Path, default=Path("bench_out/factorize.json"))
    parser.add_argument("--no-mlflow", action="store_true", help="log nothing")
    options = parser.parse_args(arguments)
    check_output(parser, options.output.parent, PROJECT)
    if options.output.is_dir():
        parser.error(f"output {options.output} is a folder. Name a JSON file.")
    for m, n in options.shapes:
        if options.rank >= min(m, n):
            parser.error(
                f"rank {options.rank} leaves nothing to approximate in a {m}x{n} weight. Give "
                f"less than {min(m, n)}."
            )
    return options


def spectrum(m: int, n: int) -> torch.Tensor:
    return torch.arange(1, min(m, n) + 1).double() ** -0.5


def make_problem(m: int, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 weight ``(m, n)`` of known spectrum, and the inputs' mean squares ``(n,)``."""
    left, right = (
        torch.linalg.qr(torch.randn(side, min(m, n), generator=generator)).Q for side in (m, n)
    )
    W = (left * spectrum(m, n).float()) @ right.mT
    return W, torch.randn(n, generator=generator).exp().square()


def compare(shape: tuple[int, int], options: argparse.Namespace) -> list[Row]:
    """A row a method, printed as it is measured."""
    W, mean_square = make_problem(*shape, torch.Generator().manual_seed(0))
    rows: list[Row] = []
    for name in options.methods:
        row = measure(name, W, mean_square, options.rank, options.repeats)
        if rows and rows[0]["method"] == REFERENCE:
            row["reference_cpu_ratio"] = rows[0]["cpu_seconds"] / row["cpu_seconds"]
        print(line(row), flush=True)
        rows.append(row)
    return rows


def measure(name: str, W: torch.Tensor, mean_square: torch.Tensor, rank: int, repeats: int) -> Row:
    """The fastest of the repeats, and the errors of what it gave."""
    cpu: list[float] = []
    wall: list[float] = []
    while len(wall) < repeats and sum(wall) < REPEAT_SECONDS:
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        factors = METHODS[name](W, mean_square, rank)
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    error = W - product(factors)
    squares = spectrum(*W.shape).square()
    return {
        "shape": list(W.shape),
        "method": name,
        "rank": rank,
        "cpu_seconds": min(cpu),
        "wall_seconds": min(wall),
        "relative_error": gram_norm(error) / gram_norm(W),
        "best_relative_error": math.sqrt(float(squares[rank:].sum() / squares.sum())),
        "activation_error": gram_norm(error, mean_square) / gram_norm(W, mean_square),
        "threads": torch.get_num_threads(),
    }


def parse_shapes(text: str) -> list[tuple[int, int]]:
    try:
        shapes = [(int(m), int(n)) for m, n in (shape.split("x") for shape in names(text))]
        if not shapes or any(side < 2 for shape in shapes for side in shape):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of shapes; write e.g. 4096x4096,1024x4096"
        ) from None
    return shapes


def parse_methods(text: str) -> list[str]:
    """In the order of the table."""
    wanted = list(METHODS) if text == "all" else names(text)
    unknown = [name for name in wanted if name not in METHODS]
    if unknown or not wanted:
        raise argparse.ArgumentTypeError(
            f"unknown method {', '.join(unknown) or repr(text)}; choose from {', '.join(METHODS)}."
        )
    return [name for name in METHODS if name in wanted]


if __name__ == "__main__":
    main()
