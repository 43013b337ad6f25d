"""What is recorded, read back from a real sqlite store."""

import csv
import json
import math

import pytest
from small_disk import small_disk

from cur_modifier.tracking import start_tracking

mlflow = pytest.importorskip("mlflow")
Figure = pytest.importorskip("matplotlib.figure").Figure


def artifacts(store, run_id):
    return {file.path for file in store.list_artifacts(run_id)}


def read(store, run_id, artifact):
    return mlflow.artifacts.load_text(store.get_run(run_id).info.artifact_uri + "/" + artifact)


def test_a_finished_run_holds_everything(store):
    tracker = start_tracking(run_name="cur-test")
    tracker.log_params({"rank": {"max": 256}, "form": "cur"})
    tracker.log_metrics({"relative_error": 0.5, "seconds": 2}, step=3)
    tracker.log_metrics({"parameters": 1e6})
    tracker.log_text("stage: é\n", "recipes/recipe.yaml")
    tracker.log_figure(Figure(), "spectra.png")
    tracker.set_tags({"model": "SmolLM2"})
    tracker.finish()

    found = mlflow.search_runs(experiment_ids=["0"]).iloc[0]
    assert found["run_id"] == tracker.run_id
    assert found["status"] == "FINISHED"
    assert found["params.rank.max"] == "256"
    assert found["metrics.parameters"] == 1e6
    assert found["tags.model"] == "SmolLM2"
    assert found["tags.environment.python"]
    assert "tags.error" not in found or found["tags.error"] is None
    run = store.get_run(tracker.run_id)
    assert run.info.run_name == "cur-test"
    assert [m.step for m in store.get_metric_history(tracker.run_id, "relative_error")] == [3]
    assert artifacts(store, tracker.run_id) == {"environment.json", "recipes", "spectra.png"}
    assert read(store, tracker.run_id, "recipes/recipe.yaml") == "stage: é\n"
    assert "torch" in json.loads(read(store, tracker.run_id, "environment.json"))


def test_a_table_is_a_csv_file_and_a_table_of_the_ui(store):
    rows = [{"module": "a", "rank": 8}, {"module": "b", "error": 0.1, "shape": (2, 3)}]
    tracker = start_tracking()
    tracker.log_table(rows, "layers.csv")
    tracker.log_table([], "nothing.csv")
    tracker.finish()

    lines = list(csv.DictReader(read(store, tracker.run_id, "layers.csv").splitlines()))
    assert lines == [
        {"module": "a", "rank": "8", "error": "", "shape": ""},
        {"module": "b", "rank": "", "error": "0.1", "shape": "(2, 3)"},
    ]
    table = mlflow.load_table("layers.json", run_ids=[tracker.run_id])
    assert list(table["module"]) == ["a", "b"]
    assert artifacts(store, tracker.run_id) == {"environment.json", "layers.csv", "layers.json"}


@pytest.mark.parametrize("error", [ValueError("rank 9 > 8"), "ValueError: rank 9 > 8"])
def test_a_failed_compression_is_failed_with_its_error(store, error):
    tracker = start_tracking()
    tracker.finish(error=error)
    tracker.finish()  # does not turn it into a success
    run = store.get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "ValueError: rank 9 > 8"


def test_nothing_goes_over_mlflows_limits(store, warnings):
    tracker = start_tracking()
    tracker.log_params(
        {f"p{i}": i for i in range(250)} | {"k" * 400: "v" * 10_000, "a?": "é" * 7000}
    )
    tracker.log_metrics({f"m{i}": i for i in range(2500)} | {"m" * 400: 1.0, "a?b": 2.0})
    tracker.set_tags({f"t{i}": "x" * 9000 for i in range(150)})
    tracker.finish(error="e" * 20_000)

    data = store.get_run(tracker.run_id).data
    assert len(data.params) == 252
    assert max(map(len, data.params)) == 250
    assert [v[-5:] for v in data.params.values() if len(v) == 6000] == ["[cut]"] * 2
    assert len(data.metrics) == 2502
    assert data.metrics["a_b"] == 2.0
    assert sum(key.startswith("t") for key in data.tags) == 150
    assert data.tags["error"].endswith("[cut]")
    assert warnings == []


def test_metrics_that_are_not_finite_are_dropped_with_a_warning(store, warnings):
    tracker = start_tracking()
    tracker.log_metrics({"good": 1.0, "bad": math.nan, "worse": math.inf})
    tracker.finish()
    assert set(store.get_run(tracker.run_id).data.metrics) == {"good"}
    assert len(warnings) == 1
    assert "bad, worse" in warnings[0]


def test_what_cannot_be_prepared_is_left_out_and_the_rest_is_recorded(store, warnings):
    tracker = start_tracking()
    tracker.log_figure(None, "broken.png")
    tracker.log_table([{"a": 1}], "no-suffix")
    tracker.log_metrics({"seconds": 1.0})
    tracker.finish()
    assert len(warnings) == 2
    assert store.get_run(tracker.run_id).data.metrics == {"seconds": 1.0}
    assert artifacts(store, tracker.run_id) == {"environment.json"}


def test_the_first_failure_warns_once_and_the_run_is_still_ended(store, warnings):
    tracker = start_tracking()
    tracker.log_text("x", "../outside")  # MLflow refuses the path
    tracker.log_text("y", "../outside")
    tracker.finish()
    assert len(warnings) == 1
    assert "outside" in warnings[0]
    assert tracker.run_id in warnings[0]
    assert store.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_full_disk_costs_a_warning_and_no_figure_that_fits(store, warnings, tmp_path):
    with small_disk(tmp_path) as disk:
        experiment = store.create_experiment("full", artifact_location=disk.as_uri())
        mlflow.set_experiment(experiment_id=experiment)
        tracker = start_tracking()
        tracker.log_text("x" * 1_000_000, "too_big.txt")
        tracker.log_metrics({"seconds": 1.0})
        tracker.finish()
        assert len(warnings) == 1 and "No space left on device" in warnings[0]
        run = store.get_run(tracker.run_id)
        assert run.info.status == "FINISHED" and run.data.metrics == {"seconds": 1.0}


def test_the_caller_may_change_what_it_passed(store):
    tracker = start_tracking()
    params, rows = {"rank": [1, 2]}, [{"a": 1}]
    tracker.log_params(params)
    tracker.log_table(rows, "layers.csv")
    params["rank"].append(3)
    rows.clear()
    tracker.finish()
    assert store.get_run(tracker.run_id).data.params == {"rank": "[1, 2]"}
    assert read(store, tracker.run_id, "layers.csv") == "a\n1\n"
