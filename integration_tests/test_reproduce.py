"""The project that repeats the published experiments: rows kept, figures drawn, claims judged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from support import refusal, run_project

from mlflow_projects.reproduce import __main__ as reproduce
from mlflow_projects.reproduce import domains


@pytest.fixture
def given(bench_model: Path, bench_data: Path, tmp_path: Path) -> dict[str, Any]:
    sizes = {"samples": 4, "windows": 2, "sequence_length": 64, "layers": 1}
    return {"model": bench_model, "data": bench_data, "output": tmp_path / "out", **sizes}


@pytest.mark.parametrize(
    ("experiment", "rows", "claim"),
    [
        ("curing", 2, "Factoring 1 layers without healing"),
        ("selection", 8, "From best to worst"),
        ("rank", 17, "Fit `gram`: "),
        ("domains", 5, "of 4 texts are modelled best"),
    ],
)
def test_an_experiment_is_a_section(
    experiment: str,
    rows: int,
    claim: str,
    given: dict[str, Any],
    bench_data: Path,
    tmp_path: Path,
) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    done = run_project("reproduce", store, entry_point=experiment, **given)
    assert done.returncode == 0, done.stderr[-4000:]
    out: Path = given["output"]
    held = json.loads((out / f"{experiment}.json").read_text())
    assert len(held["rows"]) == rows
    for row in held["rows"]:
        figures = [value for key, value in row.items() if key.startswith("perplexity ")]
        assert figures and all(value > 1 for value in figures)
    dense, *others = held["rows"]
    assert dense["model ratio"] == 1 and all(row["model ratio"] < 1 for row in others)
    results = (out / "RESULTS.md").read_text()
    assert results.startswith(f"# Results\n\n## {experiment}\n") and claim in results
    assert f"-e {experiment} " in results
    client = MlflowClient(tracking_uri=store)
    [run] = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {f"{experiment}.png", f"{experiment}.md", "rows.json"} <= artifacts

    if experiment == "curing":  # again: nothing is measured twice, other settings are refused
        again = run_project("reproduce", store, entry_point=experiment, **given)
        assert again.returncode == 0 and "== curing" not in again.stdout
        assert json.loads((out / "curing.json").read_text()) == held
        other = run_project("reproduce", store, entry_point=experiment, **{**given, "windows": 1})
        assert other.returncode != 0 and "measured with another windows" in other.stderr
        data = tmp_path / "other"
        data.symlink_to(shutil.copytree(bench_data, tmp_path / "copy"))
        other = run_project("reproduce", store, entry_point=experiment, **{**given, "data": data})
        assert other.returncode != 0 and "measured with another data" in other.stderr
        note = "# Results\n\nOn the machine in the corner."
        discussion = "\n## Discussion\n\nAs expected.\n"
        (out / "RESULTS.md").write_text(results.replace("# Results", note, 1) + discussion)
        weights = run_project("reproduce", store, entry_point="weights", **given)
        assert weights.returncode == 0, weights.stderr[-4000:]
        results = (out / "RESULTS.md").read_text()
        assert results.startswith(f"{note}\n\n## curing\n")
        found = re.findall(r"^## (\w+)", results, re.MULTILINE)
        assert found == ["curing", "weights", "Discussion"] and results.endswith(discussion)
        assert (out / "decay.png").exists() and (out / "structure.png").exists()


def test_calibration_and_evaluation_share_no_document(bench_data: Path) -> None:
    for name in domains.NAMES:
        found = domains.read(name, bench_data)
        assert found.calibration and found.evaluation
        assert not set(found.calibration) & {text for text in found.evaluation if len(text) > 200}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "/nowhere"}, "no file or folder '/nowhere/"),
        ({"windows": "4000"}, "c4: .*windows of 64 need 256000"),
        ({"model": "/nowhere/model"}, "no checkpoint at /nowhere/model"),
        ({"layers": "2"}, "layers 2 are more than the 1 that there are"),
        ({"output": "{model}/config.json"}, "is a file"),
    ],
)
def test_bad_input_is_named_before_the_slow_part(
    change: dict[str, str],
    message: str,
    given: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = {key: str(value) for key, value in given.items()}
    wanted |= {key: value.format(model=given["model"]) for key, value in change.items()}
    assert re.search(message, refusal(reproduce, wanted, capsys, ["selection"]))
    assert not (given["output"] / "selection.json").exists()
