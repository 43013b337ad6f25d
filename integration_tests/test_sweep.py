"""The project that sweeps: a study on disk, nested runs, and what happens when it is cut off."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from support import (
    project_command,
    project_environment,
    refusal,
    run_project,
)
from transformers import AutoModelForCausalLM

from mlflow_projects.sweep import __main__ as sweep


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Rows and columns, and what lies between them. " * 100)
    return path


@pytest.fixture
def given(bench_model: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    """Parameters of a small sweep."""
    sizes = {"samples": 4, "sequence_length": 64, "windows": 2, "window_length": 64}
    return {"model": bench_model, "data": text, "text": text, "output": tmp_path / "out", **sizes}


def test_a_sweep_that_is_cut_off_continues(given: dict[str, Any], tmp_path: Path) -> None:
    """Killed within its second trial and started again with less to do: one study, one parent,
    nothing twice, and nothing that was queued and is not asked for any more."""
    store = f"sqlite:///{tmp_path / 'store.db'}"
    given |= {"forms": "dense,id", "ratios": "0.8", "quantizations": "none,rtn8"}
    out: Path = given["output"]
    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen(
            project_command("sweep", given | {"quantizations": "none,rtn8,w8a8"}),
            env=project_environment(store),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not list(out.glob("001-*/log.txt")):
            assert first.poll() is None, (tmp_path / "first.log").read_text()[-4000:]
            time.sleep(0.1)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    client = MlflowClient(tracking_uri=store)
    before = {run.info.run_id: run.info.status for run in client.search_runs(["0"])}
    assert sorted(before.values()) == ["FINISHED", "RUNNING", "RUNNING"]

    done = run_project("sweep", store, **given)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = {run.info.run_id: run for run in client.search_runs(["0"])}
    [parent] = [run for run in runs.values() if "trials_finished" in run.data.metrics]
    assert parent.info.run_id in before and parent.info.status == "FINISHED"
    nested = [r for r in runs.values() if r.data.tags.get("mlflow.parentRunId")]
    assert {r.data.tags["mlflow.parentRunId"] for r in nested} == {parent.info.run_id}
    finished = [run for run in nested if run.info.status == "FINISHED"]
    assert sorted(run.info.run_name for run in finished) == [
        "dense-none",
        "dense-rtn8",
        "id-0.8-none",
        "id-0.8-rtn8",
    ]
    assert [r.info.run_name for r in nested if r.info.status == "KILLED"] == ["dense-rtn8"]
    [kept] = [run for run in finished if before.get(run.info.run_id) == "FINISHED"]
    assert kept.info.run_name == "dense-none"
    [other] = [run for run in runs.values() if "continues" in run.data.tags]
    assert other.data.tags["continues"] == parent.info.run_id

    # The front is what it says; its checkpoints are kept and registered, and no others.
    sizes = {
        run.info.run_name: (
            run.data.metrics["bytes_checkpoint"],
            run.data.metrics["perplexity/text"],
        )
        for run in finished
    }
    front = {
        name
        for name, own in sizes.items()
        if not any(x <= own[0] and y <= own[1] for x, y in sizes.values() if (x, y) != own)
    }
    assert parent.data.metrics["trials_on_front"] == len(front)
    checkpoints = {path.parent.name.partition("-")[2] for path in out.glob("*/checkpoint")}
    assert checkpoints == front
    models = client.search_logged_models(["0"])
    assert len(models) == len(front)
    for model in models:
        AutoModelForCausalLM.from_pretrained(model.tags["checkpoint"])
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"pareto.png", "trials.csv"} <= artifacts
    assert "★" in done.stdout
    assert "failed" not in done.stdout

    refused = run_project("sweep", store, **{**given, "windows": 1})
    assert refused.returncode != 0
    assert "another windows (2, now 1)" in refused.stderr


def test_a_trial_that_fails_stops_no_other(given: dict[str, Any], tmp_path: Path) -> None:
    """A ratio below what the least ranks of this model store: its trial is FAILED, with the
    reason."""
    store = f"sqlite:///{tmp_path / 'store.db'}"
    given |= {"forms": "id,dense", "ratios": "0.301", "quantizations": "none"}
    done = run_project("sweep", store, **given)
    assert done.returncode == 0, done.stderr[-4000:]
    client = MlflowClient(tracking_uri=store)
    runs = {run.info.run_name: run for run in client.search_runs(["0"])}
    assert runs["dense-none"].info.status == "FINISHED"
    failed = runs["id-0.301-none"]
    assert failed.info.status == "FAILED"
    assert "ratio 0.301 allows" in failed.data.tags["error"]
    assert not list(given["output"].glob("*id-0.301*/checkpoint"))
    assert "1 failed: id-0.301-none" in done.stdout


def test_a_search_does_not_measure_twice(given: dict[str, Any], tmp_path: Path) -> None:
    """Optuna may suggest what is known: its figures are taken over, and count as a trial."""
    store = f"sqlite:///{tmp_path / 'store.db'}"
    given |= {"forms": "dense", "quantizations": "none", "search": "tpe", "trials": 3}
    done = run_project("sweep", store, **given, keep="all")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("== trial") == 1
    assert len(list(given["output"].glob("*/checkpoint"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forms": "svd"}, "forms: svd is not one of dense, id, cur"),
        ({"forms": ""}, "forms: nothing is given"),
        ({"quantizations": "int4"}, "quantizations: int4 is not one of"),
        ({"forms": "cur"}, "form cur has no selection optimal"),
        ({"forms": "dense,id,cur"}, "form cur has no selection optimal.*selections=optimal,deim"),
        ({"selections": ","}, "selections: nothing is given"),
        (
            {"group_size": "48", "quantizations": "none,rtn4"},
            r"group_size 48 does not divide the 64 inputs of .*q_proj and of 20 .*divisor of 64",
        ),
        ({"selections": "best"}, "id-0.8-best-none: .*deim"),
        ({"ratios": "80"}, "a ratio is parameters stored after ÷ before, between 0 and 1"),
        ({"ratios": "a"}, "not a list of numbers"),
        ({"ratios": "0.2"}, "id-0.2-none: .*ratio 0.2 is not above least 0.3"),
        ({"data": "/nowhere/text.txt"}, "data: no file or folder '/nowhere/text.txt'"),
        ({"windows": "4000"}, "text: .*windows of 64 need 256000"),
        ({"output": "{text}"}, "is a file"),
        ({"model": "/nowhere/model"}, "no checkpoint at /nowhere/model"),
        ({"seed": "0.5"}, "0.5 is not a whole number from 0"),
    ],
)
def test_bad_input_is_named_before_the_first_trial(
    change: dict[str, str],
    message: str,
    given: dict[str, Any],
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = {key: str(value) for key, value in given.items()} | {"ratios": "0.8"} | change
    wanted = {key: value.format(text=text) for key, value in wanted.items()}
    assert re.search(message, refusal(sweep, wanted, capsys))
    assert not given["output"].exists()
