"""Time and error of factoring one weight, beside the straightforward procedure.

    python mlflow_projects/bench/factorize.py --shapes 4096x4096,1024x4096,14336x4096 --rank 256

Each weight has the singular values ``i^-0.5`` and random orthonormal singular vectors; the inputs
are uncorrelated, with log-normal scales. *reference* is our own writing of the procedure that the
CURing code follows: WANDA scores, a float64 randomized SVD with two power iterations, a Python loop
for DEIM on either side, two float64 pseudo-inverses. Every method runs in this process on the same
weight, and the fastest of its repeats counts.

*error* is ``‖W − Ŵ‖_F / ‖W‖_F``, *best* the smallest that any factors of the rank can have, and
*activation* the same in the norm of the inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cur_modifier.linalg import (
    CUR,
    RowID,
    Score,
    Selection,
    cur,
    gram_norm,
    interpolative,
    score,
    select_rows_and_columns,
)

Factors = CUR | RowID | tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Method = Callable[[torch.Tensor, torch.Tensor, int], Factors]  # of W, the mean squares, the rank


def spectrum(m: int, n: int) -> torch.Tensor:
    return torch.arange(1, min(m, n) + 1).double() ** -0.5


def make_problem(m: int, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 weight ``(m, n)`` of known spectrum, and the inputs' mean squares ``(n,)``."""
    left, right = (
        torch.linalg.qr(torch.randn(side, min(m, n), generator=generator)).Q for side in (m, n)
    )
    W = (left * spectrum(m, n).float()) @ right.mT
    return W, torch.randn(n, generator=generator).exp().square()


def textbook_deim(V: torch.Tensor) -> torch.Tensor:
    chosen = [int(V[:, 0].abs().argmax())]
    for j in range(1, V.shape[1]):
        coefficients = torch.linalg.solve(V[chosen, :j], V[chosen, j])
        chosen.append(int((V[:, j] - V[:, :j] @ coefficients).abs().argmax()))
    return torch.tensor(chosen)


def reference(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
    wide = W.double()
    U, _, V = torch.svd_lowrank(wide.abs() * mean_square.double().sqrt(), q=rank, niter=2)
    rows, columns = textbook_deim(U), textbook_deim(V)
    C, R = wide[:, columns], wide[rows]
    return C, torch.linalg.pinv(C) @ wide @ torch.linalg.pinv(R), R


def cur_method(selection: Selection, *, fitted: bool = False) -> Method:
    def run(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
        scored = score(Score.WANDA, W, mean_square)
        rows, columns = select_rows_and_columns(selection, scored, rank)
        return cur(W, rows, columns, mean_square if fitted else None)

    return run


def optimal_id(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
    return interpolative(W, rank)


def real_rows_id(W: torch.Tensor, mean_square: torch.Tensor, rank: int) -> Factors:
    scored = score(Score.WANDA, W, mean_square)
    rows, _ = select_rows_and_columns(Selection.DEIM, scored, rank)
    return interpolative(W, rank, rows=rows)


METHODS: dict[str, Method] = {
    "reference": reference,  # first: the others are compared with it
    "cur wanda deim": cur_method(Selection.DEIM),
    "cur wanda deim, fitted core": cur_method(Selection.DEIM, fitted=True),
    "cur wanda qdeim": cur_method(Selection.QDEIM),
    "cur wanda leverage": cur_method(Selection.LEVERAGE),
    "cur wanda norm": cur_method(Selection.NORM),
    "cur random": cur_method(Selection.RANDOM),
    "id optimal": optimal_id,
    "id real rows": real_rows_id,
}


def product(factors: Factors) -> torch.Tensor:
    if isinstance(factors, tuple):
        C, U, R = factors
        return (C @ (U @ R)).float()
    return factors.dense()


def measure(
    name: str, W: torch.Tensor, mean_square: torch.Tensor, rank: int, repeats: int
) -> dict[str, object]:
    cpu, wall = [], []
    for _ in range(repeats):
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
        "activation_error": gram_norm(error, mean_square) / gram_norm(W, mean_square),
        "best_relative_error": math.sqrt(float(squares[rank:].sum() / squares.sum())),
        "threads": torch.get_num_threads(),
    }


def compare(shape: tuple[int, int], rank: int, repeats: int) -> list[dict[str, object]]:
    W, mean_square = make_problem(*shape, torch.Generator().manual_seed(0))
    rows = [measure(name, W, mean_square, rank, repeats) for name in METHODS]
    reference_cpu = rows[0]["cpu_seconds"]
    for row in rows:
        row["reference_cpu_ratio"] = reference_cpu / row["cpu_seconds"]
        print(
            f"{'x'.join(map(str, shape)):>11}  {row['method']:<28}"
            f"{row['cpu_seconds']:8.3f}{row['wall_seconds']:8.3f}{row['reference_cpu_ratio']:8.1f}"
            f"{row['relative_error']:9.4f}{row['best_relative_error']:8.4f}"
            f"{row['activation_error']:12.4f}",
            flush=True,
        )
    return rows


def write_json(rows: list[dict[str, object]], path: Path) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(rows, file, indent=2)
    os.replace(file.name, path)


def parse_shapes(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(m), int(n)) for m, n in (shape.split("x") for shape in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of shapes; write e.g. 4096x4096,1024x4096"
        ) from None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=parse_shapes, default="4096x4096,1024x4096,14336x4096")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=1, help="more of them burn CPU time waiting for each other"
    )
    parser.add_argument("--output", type=Path, default=Path("bench_out/factorize.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)  # torch.svd_lowrank in the reference takes no generator
    print(
        f"{'shape':>11}  {'method':<28}{'cpu s':>8}{'wall s':>8}{'ref/cpu':>8}"
        f"{'error':>9}{'best':>8}{'activation':>12}"
    )
    rows = [
        row
        for shape in arguments.shapes
        for row in compare(shape, arguments.rank, arguments.repeats)
    ]
    write_json(rows, arguments.output)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
