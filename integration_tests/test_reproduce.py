"""The project that repeats the published experiments: rows kept, figures drawn, claims judged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from encoders import put_encoder, put_tasks
from mlflow import MlflowClient
from support import refusal, run_project

from mlflow_projects.reproduce import __main__ as reproduce
from mlflow_projects.reproduce import domains
from mlflow_projects.reproduce.stat import METHODS


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


@pytest.fixture
def task_models(tmp_path: Path) -> Path:
    """A dense checkpoint of SST-2 with random weights."""
    labels = {"id2label": {0: "negative", 1: "positive"}}
    put_encoder(tmp_path / "models" / "sst2", "BertForSequenceClassification", **labels)
    return tmp_path / "models"


def test_encoders_are_pruned_by_every_method(task_models: Path, tmp_path: Path) -> None:
    store, out = f"sqlite:///{tmp_path / 'store.db'}", tmp_path / "out"
    data = put_tasks(tmp_path / "data")
    given = {"models": task_models, "data": data, "output": out, "samples": 40, "tasks": "sst2"}
    done = run_project("reproduce", store, entry_point="stat", budgets="0.5", limit=30, **given)
    assert done.returncode == 0, done.stderr[-4000:]
    dense, *pruned = json.loads((out / "stat.json").read_text())["rows"]
    assert dense["method"] == "dense" and dense["MACs left"] == 1
    assert [row["method"] for row in pruned] == list(METHODS)
    for row in pruned:
        assert 0.3 < row["MACs left"] <= 0.5 and 0 <= row["score"] <= 1
        assert row["metric"] == "accuracy" and row["examples"] == 30
    results = (out / "RESULTS.md").read_text()
    assert re.search(r"less than 1 % of accuracy, (\*\*holds|does \*\*not).* for ours\. ", results)
    assert "At 0.5 ours is ahead of the best of the others by " in results
    assert "-P tasks=sst2" in results and "-P models=MODELS" in results
    assert (out / "stat.png").exists()
    [run] = MlflowClient(tracking_uri=store).search_runs(["0"])
    assert run.info.status == "FINISHED" and "sst2/accuracy" in run.data.metrics

    # Another budget: rows that are there stay there, and are not measured again.
    more = run_project("reproduce", store, entry_point="stat", budgets="0.6,0.5", limit=30, **given)
    assert more.returncode == 0, more.stderr[-4000:]
    assert more.stdout.count("== stat") == len(METHODS) and "MACs 0.5" not in more.stdout
    rows = json.loads((out / "stat.json").read_text())["rows"]
    assert len(rows) == 1 + 2 * len(METHODS)
    other = run_project("reproduce", store, entry_point="stat", budgets="0.5", limit=20, **given)
    assert other.returncode != 0 and "measured with another limit" in other.stderr


def test_a_decoder_is_pruned_in_16_and_in_4_bits(given: dict[str, Any], tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    done = run_project("reproduce", store, entry_point="pruning", budgets="0.8", **given)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((given["output"] / "pruning.json").read_text())["rows"]
    assert len(rows) == 2 * (1 + 2 * 3 + 1 + 1)
    found = {(row["method"], row["shapes"], row["bits"]): row for row in rows}
    dense, quantized = found["dense", "", 16], found["dense", "", 4]
    assert dense["layer ratio"] == quantized["layer ratio"] == 1
    assert quantized["MB"] < dense["MB"] / 2
    for shapes in ("uniform", "free"):
        for bits in (16, 4):
            row = found["neurons", shapes, bits]
            assert row["layer ratio"] <= 0.8 and row["perplexity wikitext"] > 1
    assert found["neurons", "free", 4]["MB"] < found["neurons", "free", 16]["MB"]
    assert found["id", "", 16]["layer ratio"] < 0.82
    results = (given["output"] / "RESULTS.md").read_text()
    assert "At 0.8 in 4 bits: " in results and "-P budgets=0.8" in results
    assert (given["output"] / "pruning.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tasks": "sst2,mrpc"},
            r"no dense checkpoint of mrpc\. Make them:\s+mlflow run mlflow_projects/finetune .*"
            r"-P task=mrpc .*-P output=\S+/models/mrpc",
        ),
        ({"models": None}, "models is missing"),
        ({"tasks": "sst3"}, "no task 'sst3' of GLUE or SQuAD; near it: sst2"),
        ({"tasks": "squad"}, "tasks squad: .*Name tasks of GLUE"),
        ({"samples": "5000"}, "5000 samples are more than sst2 has"),
        ({"budgets": "0.5,1.5"}, "'1.5' is not a share between 0 and 1"),
    ],
)
def test_encoders_and_data_are_checked_first(
    change: dict[str, str | None],
    message: str,
    task_models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted: dict[str, str | None] = {
        "models": str(task_models),
        "data": str(put_tasks(tmp_path / "data")),
        "output": str(tmp_path / "out"),
        "tasks": "sst2",
        "samples": "40",
    }
    assert re.search(message, refusal(reproduce, wanted | change, capsys, ["stat"]))
    assert not (tmp_path / "out" / "stat.json").exists()


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
