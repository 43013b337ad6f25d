"""The MLflow projects, run as a user runs them: `mlflow run`, a real store."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from encoders import put_encoder, put_tasks
from mlflow import MlflowClient
from small_disk import small_disk
from support import REPOSITORY, refusal, run_project
from transformers import AutoModelForCausalLM

from mlflow_projects import arguments, registry
from mlflow_projects.compress import __main__ as compress

PROJECTS = REPOSITORY / "mlflow_projects"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Rows and columns, and what lies between them. " * 200)
    return path


def test_compress_is_one_run_with_its_model(bench_model: Path, text: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    done = run_project(
        "compress",
        store,
        model=bench_model,
        recipe="id",
        data=text,
        samples=4,
        sequence_length=64,
        dtype="float32",
        output=tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    client = MlflowClient(tracking_uri=store)
    [run] = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.params["recipe"] == "id"
    assert run.data.params["compress_stage.cur_modifiers.CURModifier.form"] == "id"
    [model] = client.search_logged_models(["0"])
    assert model.source_run_id == run.info.run_id
    assert model.tags["checkpoint"] == str(tmp_path / "out")
    metrics = {metric.key: metric.value for metric in model.metrics}
    weights = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert metrics["bytes_checkpoint"] == weights
    assert 0.7 < metrics["ratio_targets"] <= 0.8
    AutoModelForCausalLM.from_pretrained(model.tags["checkpoint"])
    artifacts = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert "layers.csv" in artifacts and not any("safetensors" in path for path in artifacts)


def test_compress_that_fails_registers_nothing(
    bench_model: Path, text: Path, tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    wanted = {"model": bench_model, "recipe": "id", "data": text, "output": tmp_path / "out"}
    done = run_project("compress", store, **wanted, samples=4000, sequence_length=64)
    assert done.returncode != 0
    assert "windows of 64 need 256000" in done.stderr
    client = MlflowClient(tracking_uri=store)
    assert [run.info.status for run in client.search_runs(["0"])] == ["FAILED"]
    assert not client.search_logged_models(["0"])
    assert not (tmp_path / "out").exists()


def test_compress_on_a_full_disk_leaves_nothing(
    bench_model: Path, text: Path, tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    with small_disk(tmp_path) as disk:
        wanted = {"model": bench_model, "recipe": "id", "data": text, "output": disk / "out"}
        sizes = {"samples": 4, "sequence_length": 64, "dtype": "float32"}
        done = run_project("compress", store, **wanted, **sizes)
        assert done.returncode != 0 and "No space left on device" in done.stderr
        assert not list(disk.iterdir())
    client = MlflowClient(tracking_uri=store)
    [run] = client.search_runs(["0"])
    assert run.info.status == "FAILED"
    assert not client.search_logged_models(["0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "nothing"}, "no recipe nothing.*id_refined"),
        ({"recipe": "{text}"}, "text.txt names no modifier"),
        ({"data": "/nowhere/text.txt"}, "no file or folder '/nowhere/text.txt'"),
        ({"samples": "0"}, "not a whole number"),
        ({"samples": "1.5"}, "not a whole number"),
        ({"output": "{text}"}, "is a file"),
        ({"output": "{text}/out"}, "out lies below .*text.txt, which is a file"),
        ({"model": "{model}", "samples": "4000"}, "windows of 1024 need 4096000"),
        ({"model": "/nowhere/model"}, "no checkpoint at /nowhere/model"),
    ],
)
def test_bad_input_is_named_before_the_slow_part(
    change: dict[str, str],
    message: str,
    bench_model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"model": "x", "recipe": "id", "data": str(text), "output": str(tmp_path / "out")}
    given |= {key: value.format(text=text, model=bench_model) for key, value in change.items()}
    assert re.search(message, refusal(compress, given, capsys))


def test_figures_have_names_that_mlflow_takes(tmp_path: Path) -> None:
    (tmp_path / "wiki (1)+2.test.raw").touch()
    assert arguments.text_name(str(tmp_path / "wiki (1)+2.test.raw")) == "wiki -1--2.test"
    assert arguments.text_name("Salesforce/wikitext") == "wikitext"


def test_a_model_whose_run_was_deleted_gets_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow still finds it, but takes no figures for its run."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'store.db'}")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'store.db'}")
    made = []
    for name in ("first", "second"):
        with mlflow.start_run() as run:
            made.append(registry.register(run.info.run_id, name, tmp_path, {}))
    assert registry.registered(tmp_path).model_id == made[1].model_id
    mlflow.delete_run(made[1].source_run_id)
    assert registry.registered(tmp_path).model_id == made[0].model_id
    mlflow.delete_run(made[0].source_run_id)
    assert registry.registered(tmp_path) is None


def test_a_path_in_the_folder_of_the_project_is_refused(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PROJECTS / "compress")
    with pytest.raises(SystemExit):
        compress.parse(["--recipe", "id", "--data", str(text), "--output", "out"])
    assert "-P output=$PWD/out" in capsys.readouterr().err


def documented(kind: str) -> list[str]:
    """Names of a kind in the table of what is logged."""
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (PROJECTS / "README.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    return [name for row in rows if row[1] == kind for name in re.findall(r"`([^`]+)`", row[2])]


def test_what_is_logged_is_what_the_table_says(
    bench_model: Path, text: Path, tmp_path: Path
) -> None:
    """Every metric and artifact of a stage with healing and of five projects is in the table, and
    `mlflow.search_runs` finds every metric that it names."""
    store = f"sqlite:///{tmp_path / 'store.db'}"
    recipes = {}
    for name, more in {"angular": {"refine": {"epochs": 1}}, "sensitivity": {}}.items():
        cur = {"rank": {"fixed": 8}, "layers": {"select": name, "count": 1}, **more}
        stage: dict[str, Any] = {"cur_modifiers": {"CURModifier": cur}}
        if more:
            heal = {"steps": 2, "batch_size": 1, "warmup_steps": 1, "validate_every": 1}
            stage["healing_modifiers"] = {"CURHealModifier": heal}
        recipes[name] = stage
    prune = {"units": ["neurons", "heads"], "budget": {"ratio": 0.7}, "multiple_of": 16}
    recipes["removal"] = {"prune_modifiers": {"IDPruningModifier": prune}}
    for name, stage in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"compress_stage": stage}))
        given = {"model": bench_model, "recipe": tmp_path / f"{name}.yaml", "data": text}
        given |= {"samples": 4, "sequence_length": 64, "output": tmp_path / name}
        done = run_project("compress", store, **given)
        assert done.returncode == 0, done.stderr[-4000:]
    tasks = tmp_path / "tasks" / "piqa"
    tasks.mkdir(parents=True)
    question = {"goal": "open a door", "sol1": "push it", "sol2": "eat it"}
    (tasks / "valid.jsonl").write_text(4 * (json.dumps(question) + "\n"))
    (tasks / "valid-labels.lst").write_text("0\n1\n0\n1\n")
    given = {"model": tmp_path / "angular", "baseline": bench_model, "data": text, "windows": 2}
    given |= {"sequence_length": 64, "tasks": "piqa", "task_data": tasks.parent}
    done = run_project("evaluate", store, **given)
    assert done.returncode == 0, done.stderr[-4000:]
    given = {"model": bench_model, "data": text, "text": text, "forms": "dense", "samples": 4}
    given |= {"quantizations": "none", "sequence_length": 64, "windows": 2, "window_length": 64}
    done = run_project("sweep", store, **given, output=tmp_path / "sweep")
    assert done.returncode == 0, done.stderr[-4000:]
    given = {"shapes": "12x12", "rank": 4, "methods": "id optimal"}
    done = run_project("bench/factorize", store, **given, output=tmp_path / "factorize.json")
    assert done.returncode == 0, done.stderr[-4000:]

    given = {"model": put_encoder(tmp_path / "encoder"), "task": "sst2", "epochs": 1}
    given |= {"task_data": put_tasks(tmp_path / "data"), "output": tmp_path / "tuned"}
    done = run_project("finetune", store, **given)
    assert done.returncode == 0, done.stderr[-4000:]

    mlflow.set_tracking_uri(store)
    found = mlflow.search_runs(["0"])
    metrics = {c.removeprefix("metrics.") for c in found if c.startswith("metrics.")}
    places = {"TEXT": "text", "TASK": "piqa", "METRIC": "acc", "NAME": "perplexity/text"}
    places |= {"SHAPE": "12x12", "METHOD": "id optimal", "GLUE": "sst2", "SCORE": "accuracy"}
    named = set()
    for name in documented("metric"):
        for place, value in places.items():
            name = name.replace(place, value)
        named.add(name)
    optional = {"peak_accelerator_bytes"}  # needs an accelerator
    optional |= {name for name in named if name.startswith("MODEL/")}  # of bench/serving
    # Of the experiment with convolutions, whose own test looks for them.
    optional |= {name for name in named if name.startswith("NETWORK/")} | {"macs_kept"}
    optional |= {"channels_before", "channels_after"}  # of models of images
    assert named - metrics <= optional
    others = {name for name in metrics - named if not name.startswith("baseline/")}
    assert {name.replace("acc_norm", "acc") for name in others} <= named

    client = MlflowClient()
    artifacts = {file.path for run in found["run_id"] for file in client.list_artifacts(run)} - {
        "layers.json",
        "healing.json",
    }  # the tables of MLflow's own pages
    assert artifacts <= {*documented("artifact")}
    tags = {c.removeprefix("tags.") for c in found if c.startswith("tags.")}
    assert {"evaluated_model", "environment.torch"} <= tags
