"""The bench of factorizations: every method gives factors, and the run holds their figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from mlflow_projects.bench.factorize.__main__ import main, parse
from mlflow_projects.bench.factorize.methods import METHODS, REFERENCE

FIELDS = {
    "shape",
    "method",
    "rank",
    "cpu_seconds",
    "wall_seconds",
    "relative_error",
    "best_relative_error",
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[None]:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'store.db'}")
    yield
    mlflow.set_tracking_uri(before)


def test_every_method_is_measured_beside_the_others(store: None, tmp_path: Path) -> None:
    output = tmp_path / "factorize.json"
    main(["--shapes=40x32,24x36", "--rank=8", "--repeats=2", f"--output={output}"])
    rows = json.loads(output.read_text())
    assert [(row["shape"], row["method"]) for row in rows] == [
        (shape, method) for shape in ([40, 32], [24, 36]) for method in METHODS
    ]
    for row in rows:
        assert row.keys() >= FIELDS
        best = row["best_relative_error"]
        assert best - 1e-5 <= row["relative_error"] < 1.5
        if row["method"] in ("truncated SVD", "id optimal"):
            assert row["relative_error"] == pytest.approx(best, rel=1e-4)
        if "qr" in row["method"].lower() or row["method"].startswith("scipy"):
            assert row["relative_error"] < 1  # a wrong order of rows would be above
    assert (tmp_path / "factorize.png").read_bytes().startswith(b"\x89PNG")
    [run] = mlflow.search_runs(output_format="list")
    assert run.data.params == {"rank": "8", "threads": "1"}
    named = {
        f"{shape}/{method}/{what}"
        for shape in ("40x32", "24x36")
        for method in METHODS
        for what in ("cpu_seconds", "relative_error")
    }
    assert run.data.metrics.keys() == named


def test_a_part_is_measured_without_the_reference(tmp_path: Path) -> None:
    output = tmp_path / "factorize.json"
    given = ["--shapes=12x12", "--rank=4", "--no-mlflow", f"--output={output}"]
    main([*given, "--methods=id optimal, cur deim"])
    rows = json.loads(output.read_text())
    assert [row["method"] for row in rows] == ["cur deim", "id optimal"]
    assert REFERENCE not in json.dumps(rows)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--shapes=4096"], "'4096' is not a list of shapes"),
        (["--shapes="], "is not a list of shapes"),
        (["--methods=nothing"], "unknown method nothing; choose from reference,"),
        (["--shapes=8x16", "--rank=8"], "rank 8 leaves nothing to approximate in a 8x16 weight"),
        (["--output=."], "Name a JSON file"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert reason in capsys.readouterr().err
