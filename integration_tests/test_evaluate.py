"""The project that evaluates: perplexity and lm-eval's tasks, in transformers and in vLLM."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from support import REPOSITORY, refusal, run_project
from transformers import AutoModelForCausalLM, AutoTokenizer

from cur_modifier.data import token_windows
from cur_modifier.evaluate import perplexity
from mlflow_projects import figures
from mlflow_projects.evaluate import __main__ as evaluate
from mlflow_projects.evaluate import backends, local_tasks, tasks
from tools.vllm_server import serve

NAMES = ("boolq", "piqa", "winogrande", "arc_easy", "mmlu_anatomy")


def questions(folder: Path, *, count: int = 8) -> Path:
    """A few questions of each task, in the files of their authors."""

    def lines(path: Path, rows: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    numbers = range(count)
    lines(
        folder / "boolq" / "validation.jsonl.gz",
        [{"question": f"is {i} even", "answer": i % 2 == 0, "passage": "Count."} for i in numbers],
    )
    lines(
        folder / "piqa" / "valid.jsonl",
        [{"goal": f"open door {i}", "sol1": "push it", "sol2": "eat it"} for i in numbers],
    )
    (folder / "piqa" / "valid-labels.lst").write_text("".join(f"{i % 2}\n" for i in numbers))
    lines(
        folder / "winogrande" / "validation_xl.jsonl",
        [
            {"sentence": f"Ann {i} met Bo, so _ left.", "option1": "Ann", "option2": "Bo"}
            | {"answer": str(1 + i % 2)}
            for i in numbers
        ],
    )
    lines(
        folder / "arc" / "ARC-Easy.test.jsonl",
        [
            {"id": f"q{i}", "query": f"Question: What is {i}?\nAnswer:", "gold": i % 3}
            | {"choices": ["a number", "a colour", "a fruit"]}
            for i in numbers
        ],
    )
    folder.joinpath("mmlu").mkdir()
    with tarfile.open(folder / "mmlu" / "mmlu.tar.gz", "w:gz") as tar:
        for split in ("dev", "test"):
            text = io.StringIO()
            csv.writer(text).writerows(
                [f"Bone {i}, which?", "one", "two", "three", "four", "ABCD"[i % 4]] for i in numbers
            )
            content = text.getvalue().encode()
            member = tarfile.TarInfo(f"MMLU/{split}/anatomy_{split}.csv")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    return questions(tmp_path / "tasks")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held.out.txt"
    path.write_text("Rows and columns, and what lies between them. " * 100)
    return path


def metrics_of(store: str, name: str = "evaluate") -> dict[str, float]:
    client = MlflowClient(tracking_uri=store)
    [run] = [
        run
        for run in client.search_runs(["0"])
        if run.data.tags["mlflow.source.name"].endswith(name)
    ]
    assert run.info.status == "FINISHED"
    return dict(run.data.metrics)


def test_figures_join_the_model_that_was_compressed(
    bench_model: Path, text: Path, task_data: Path, tmp_path: Path
) -> None:
    """The project's figures are lm-eval's and ours, and lie with the run, the model and its run."""
    store = f"sqlite:///{tmp_path / 'store.db'}"
    out = tmp_path / "out"
    given = {"model": bench_model, "recipe": "id", "data": text, "output": out}
    done = run_project("compress", store, **given, samples=4, sequence_length=64)
    assert done.returncode == 0, done.stderr[-4000:]
    done = run_project(
        "evaluate",
        store,
        model=out,
        baseline=bench_model,
        data=text,
        windows=3,
        sequence_length=64,
        stride=16,
        tasks=",".join(NAMES),
        task_data=task_data,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    found = metrics_of(store)
    client = MlflowClient(tracking_uri=store)
    [model] = client.search_logged_models(["0"])
    of_model = {metric.key: metric.value for metric in model.metrics}
    of_source = client.get_run(model.source_run_id).data.metrics
    own = {key: value for key, value in found.items() if not key.startswith("baseline/")}
    assert own.items() <= of_model.items() and own.items() <= of_source.items()
    assert not any(key.startswith("baseline/") for key in of_model | of_source)

    [run] = [r for r in client.search_runs(["0"]) if "evaluated_model" in r.data.tags]
    assert run.data.tags["mlflow.parentRunId"] == model.source_run_id
    assert run.data.params["stride"] == "16"
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"figures.csv", "before_after.png", "lm_eval-model.json"} <= artifacts

    for source, prefix in ((out, ""), (bench_model, "baseline/")):
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        windows = token_windows(
            [text.read_text()],
            AutoTokenizer.from_pretrained(source),
            windows=3,
            sequence_length=64,
            stride=16,
        )
        expected = perplexity(loaded, windows, stride=16)
        assert expected.tokens == 63 + 2 * 16
        assert found[f"{prefix}perplexity/held.out"] == pytest.approx(expected.perplexity)
        for key, value in direct(source, task_data, tmp_path / "direct").items():
            assert found[f"{prefix}{key}"] == pytest.approx(value), key


def direct(model: Path, data: Path, folder: Path) -> dict[str, float]:
    """The same tasks, asked by lm-eval alone."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if not folder.exists():
        local_tasks.write_tasks(data, folder)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32", "device": "cpu"},
        tasks=list(NAMES),
        batch_size=8,
        task_manager=TaskManager(include_path=str(folder)),
    )["results"]
    return {
        f"{task}/{key.replace(',none', '')}": value
        for task, metrics in results.items()
        for key, value in metrics.items()
        if key.endswith(",none") and isinstance(value, int | float)
    }


def test_a_server_may_know_the_end_of_a_path() -> None:
    """`vllm serve out` in a checkpoint's folder answers by that name."""
    for name in ("/home/me/out", "out", "./out", "me/out"):
        assert backends._names(name, "/home/me/out"), name
    for name in (None, "", ".", "you/out", "ut", "/out", "/home/me/out/more"):
        assert not backends._names(name, "/home/me/out"), name
    assert backends._names("org/out", "org/out") and not backends._names("out", "org/out")


def test_what_is_better_lower_has_a_panel_of_its_own() -> None:
    results = {"lambada": {"perplexity,none": 30.0, "acc,none": 0.4}}
    better = {"lambada": {"perplexity": False, "acc": True}}
    found = list(tasks._figures(results, {}, better))
    panels = figures.before_after(found, found).axes
    assert [panel.get_xlabel() for panel in panels] == [
        "perplexity (lower is better)",
        "score (higher is better)",
    ]
    assert [len(panel.get_yticks()) for panel in panels] == [1, 1]


def test_local_questions_are_those_of_the_files(task_data: Path, tmp_path: Path) -> None:
    """lm-eval's own prompts, around what the files hold. Fails when upstream moves its tasks."""
    from lm_eval.tasks import TaskManager

    assert set(local_tasks.write_tasks(task_data, tmp_path / "made")) == set(NAMES)
    loaded = TaskManager(include_path=str(tmp_path / "made")).load(list(NAMES))["tasks"]

    def prompts(name: str, index: int) -> tuple[str, Any, Any]:
        task = loaded[name]
        doc = list(task.eval_docs)[index]
        return task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)

    assert prompts("boolq", 1) == ("Count.\nQuestion: is 1 even?\nAnswer:", ["no", "yes"], 0)
    assert prompts("boolq", 2)[2] == 1
    assert prompts("piqa", 1) == ("Question: open door 1\nAnswer:", ["push it", "eat it"], 1)
    assert prompts("winogrande", 1) == (1, ["Ann 1 met Bo, so Ann", "Ann 1 met Bo, so Bo"], "left.")
    assert prompts("arc_easy", 2) == (
        "Question: What is 2?\nAnswer:",
        ["a number", "a colour", "a fruit"],
        2,
    )
    text, choices, target = prompts("mmlu_anatomy", 3)
    assert text.startswith("Bone 3, which?\nA. one\nB. two") and choices[target] == "D"


def test_real_questions_are_all_read(tmp_path: Path) -> None:
    """The files that are published: as many questions as their authors say."""
    data = REPOSITORY.parent / "shared" / "data" / "zeroshot"
    if not data.is_dir():
        pytest.skip(f"no {data}")
    made = tmp_path / "made"
    names = local_tasks.write_tasks(data, made)

    def lines(name: str) -> int:
        return sum(1 for _ in (made / name).open())

    assert len([name for name in names if name.startswith("mmlu_")]) == 57
    assert lines("boolq.validation.jsonl") == 3270
    assert lines("piqa.validation.jsonl") == 1838
    assert lines("winogrande.validation.jsonl") == 1267
    assert lines("arc_easy.test.jsonl") == 2376
    assert lines("arc_challenge.test.jsonl") == 1172
    assert sum(lines(file.name) for file in made.glob("mmlu_*.test.jsonl")) == 14042


@pytest.mark.serve
@pytest.mark.slow
def test_vllm_agrees_with_transformers(
    smollm2: Path, reference_text: Path, task_data: Path, tmp_path: Path
) -> None:
    """The same figures through a server, one that the project starts and one that runs."""
    common = {
        "model": smollm2,
        "data": reference_text,
        "windows": 2,
        "sequence_length": 256,
        "tasks": "boolq,piqa",
        "task_data": task_data,
    }
    found = {}
    arguments = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "2048")
    with serve(smollm2, *arguments, log=tmp_path / "vllm.log") as server:
        for name, extra in {
            "url": {"backend": f"{server.url}/v1"},
            "transformers": {"dtype": "float32"},
        }.items():
            store = f"sqlite:///{tmp_path / name}.db"
            done = run_project("evaluate", store, **common, **extra)
            assert done.returncode == 0, done.stderr[-4000:]
            found[name] = metrics_of(store)
        other = run_project("evaluate", store, **{**common, "model": tmp_path.parent}, **extra)
        assert other.returncode != 0 and "holds no config.json" in other.stderr
    store = f"sqlite:///{tmp_path / 'vllm'}.db"
    done = run_project("evaluate", store, **common, backend="vllm", dtype="float32")
    assert done.returncode == 0, done.stderr[-4000:]
    found["vllm"] = metrics_of(store)
    for name in ("url", "vllm"):
        assert found[name].keys() == found["transformers"].keys()
        key = "perplexity/reference"
        assert found[name][key] == pytest.approx(found["transformers"][key], rel=1e-3)
        for key in ("boolq/acc", "piqa/acc"):
            assert found[name][key] == pytest.approx(found["transformers"][key], abs=0.126), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "nothing to measure"),
        ({"data": "/nowhere/text.txt"}, "no file or folder '/nowhere/text.txt'"),
        ({"data": "{text},{text}"}, "two texts are called held.out"),
        ({"windows": "4000"}, "windows of 64 need 256000"),
        ({"stride": "65"}, "stride 65 leaves out tokens"),
        ({"model": "/nowhere/model"}, "no checkpoint at /nowhere/model"),
        ({"model": "{folder}"}, "not a checkpoint: it holds no config.json"),
        ({"tasks": "bolq", "task-data": "{tasks}"}, "no task bolq; near it: .*boolq"),
        ({"tasks": "boolq", "task-data": "{folder}/none"}, "no folder"),
        ({"tasks": "boolq", "task-data": "{empty}"}, "none of the tasks' files"),
        ({"few-shot": "1.5"}, "few_shot 1.5"),
        ({"baseline": "{model}"}, "the baseline is the model itself"),
        ({"backend": "onnx"}, "'onnx' is not transformers, vllm or the URL"),
        ({"backend": "http://127.0.0.1:9"}, "no server of the OpenAI API answers.*backend=vllm"),
        ({"backend": "http://127.0.0.1:9", "baseline": "x"}, "serves one model"),
        ({"backend": "http://127.0.0.1:9", "dtype": "float32"}, "a dtype of its own"),
        ({"baseline": "{other}"}, "cut held.out into other tokens"),
    ],
)
def test_bad_input_is_named_before_the_slow_part(
    change: dict[str, str | None],
    message: str,
    bench_model: Path,
    text: Path,
    task_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"text": text, "folder": tmp_path, "tasks": task_data, "empty": tmp_path / "empty"}
    places["model"] = bench_model
    places["other"] = shutil.copytree(bench_model, tmp_path / "other")
    tokenizer = places["other"] / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"a":', '"_":').replace('"b":', '"a":'))
    given: dict[str, Any] = {"model": str(bench_model), "data": str(text), "windows": "2"}
    given |= {"sequence-length": "64", **change}
    given = {k: v if v is None else v.format(**places) for k, v in given.items()}
    assert re.search(message, refusal(evaluate, given, capsys))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("boolq/validation.jsonl", '{"question": "x"}\n', "line 1: KeyError"),
        ("boolq/validation.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("piqa/valid-labels.lst", "0\n", "8 lines, .*valid-labels.lst 1"),
        ("mmlu/mmlu.tar.gz", None, "lacks dev or test questions of all subjects"),
    ],
)
def test_broken_questions_are_named(
    file: str, content: str | None, message: str, task_data: Path, tmp_path: Path
) -> None:
    """And nothing is left behind that a later run would take for whole."""
    path = task_data / file
    if content is None:
        tarfile.open(path, "w:gz").close()
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        local_tasks.write_tasks(task_data, tmp_path / "made")
    assert not list(tmp_path.glob("made*"))
