"""Which run is written, when none is, and how an unfinished one ends."""

import gc
import sys
import time

import pytest

from cur_modifier.tracking import NullTracker, recording, start_tracking

mlflow = pytest.importorskip("mlflow")


def wait_for_status(store, run_id, status):
    deadline = time.monotonic() + 30
    while store.get_run(run_id).info.status != status and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.get_run(run_id).info.status == status


def test_the_users_own_run_is_joined_and_not_ended(store):
    with mlflow.start_run() as own:
        tracker = start_tracking()
        tracker.log_metrics({"seconds": 1.0})
        tracker.finish(error="broken")
        assert tracker.run_id == own.info.run_id
        assert store.get_run(own.info.run_id).info.status == "RUNNING"
        assert mlflow.active_run().info.run_id == own.info.run_id
    run = store.get_run(own.info.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"seconds": 1.0}
    assert run.data.tags["error"] == "broken"


def test_the_run_of_mlflow_projects_is_joined(store, monkeypatch):
    run = store.create_run("0")
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    tracker = start_tracking()
    tracker.finish()
    assert tracker.run_id == run.info.run_id
    assert store.get_run(tracker.run_id).info.status == "RUNNING"


def test_two_compressions_in_one_run_keep_both_records(store, warnings):
    with mlflow.start_run() as own:
        for rank in (8, 16):
            tracker = start_tracking()
            tracker.log_params({"form": "cur", "rank": rank, f"only_{rank}": 1})
            tracker.log_table([{"rank": rank}], "layers.csv")
            tracker.finish()
    assert store.get_run(own.info.run_id).data.params == {
        "form": "cur",
        "rank": "8",
        "only_8": "1",
        "only_16": "1",
    }
    assert len(warnings) == 1
    assert "(rank)" in warnings[0]
    files = {file.path for file in store.list_artifacts(own.info.run_id)}
    assert {"layers.csv", "layers.json", "layers_2.csv", "layers_2.json"} < files


def test_the_new_run_is_not_the_active_one(store):
    tracker = start_tracking()
    assert mlflow.active_run() is None
    with mlflow.start_run() as own:
        assert own.info.run_id != tracker.run_id
    tracker.finish()


def test_the_experiment_is_the_one_of_start_run(store, monkeypatch):
    """Fails if MLflow moves or changes the private function that ``_create_run`` needs."""

    def experiment_and_tags():
        tracker = start_tracking()
        tracker.finish()
        with mlflow.start_run() as own:
            pass
        ours, theirs = (store.get_run(run).data.tags for run in (tracker.run_id, own.info.run_id))
        assert ours["mlflow.user"] == theirs["mlflow.user"]
        assert ours["mlflow.source.name"] == theirs["mlflow.source.name"]
        ids = {store.get_run(run).info.experiment_id for run in (tracker.run_id, own.info.run_id)}
        assert len(ids) == 1
        return store.get_experiment(ids.pop()).name

    assert experiment_and_tags() == "Default"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "named by the environment")
    assert experiment_and_tags() == "named by the environment"
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", store.create_experiment("numbered"))
    assert experiment_and_tags() == "numbered"
    mlflow.set_experiment("set by the user")
    assert experiment_and_tags() == "set by the user"


def test_nothing_is_recorded_when_disabled(store):
    tracker = start_tracking(enabled=False)
    assert isinstance(tracker, NullTracker)
    tracker.log_params({"a": 1})
    tracker.log_metrics({"a": 1.0}, step=1)
    tracker.log_text("a", "a.txt")
    tracker.log_table([{"a": 1}], "a.csv")
    tracker.log_figure(None, "a.png")
    tracker.set_tags({"a": "b"})
    tracker.finish(error=ValueError())
    assert tracker.run_id is None
    assert store.search_runs(["0"]) == []


def test_nothing_is_recorded_without_mlflow(monkeypatch, warnings):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert isinstance(start_tracking(), NullTracker)
    assert warnings == []


def test_only_the_first_rank_records(store, monkeypatch):
    distributed = pytest.importorskip("torch").distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    assert isinstance(start_tracking(), NullTracker)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    tracker = start_tracking()
    tracker.finish()
    assert tracker.run_id is not None


def test_a_run_that_does_not_exist_warns_and_names_the_remedy(store, monkeypatch, warnings):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert isinstance(start_tracking(), NullTracker)
    assert len(warnings) == 1
    assert "MLFLOW_TRACKING_URI" in warnings[0]


def test_passwords_stay_out_of_the_warnings(clean_mlflow, warnings):
    mlflow.set_tracking_uri("http://someone:secret@127.0.0.1:1")
    assert isinstance(start_tracking(), NullTracker)
    assert len(warnings) == 1
    assert "//127.0.0.1:1" in warnings[0]
    assert "secret" not in warnings[0]


def test_a_tracker_that_nobody_holds_fails_its_run(store):
    tracker = start_tracking()
    run_id = tracker.run_id
    del tracker
    gc.collect()
    wait_for_status(store, run_id, "FAILED")
    assert store.get_run(run_id).data.tags["error"] == recording.ABANDONED


def test_a_process_that_ends_early_fails_its_run(store, run_python):
    code = f"""
import mlflow
from cur_modifier.tracking import start_tracking
mlflow.set_tracking_uri({mlflow.get_tracking_uri()!r})
tracker = start_tracking()
tracker.log_metrics({{"seconds": 1.0}})
print(tracker.run_id)
"""
    run = store.get_run(run_python(code).split()[-1])
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == recording.ABANDONED
    assert run.data.metrics == {"seconds": 1.0}


def test_importing_the_package_imports_neither_mlflow_nor_matplotlib(run_python):
    code = """
import cur_modifier.tracking, cur_modifier.tracking.figures
print(sorted({"mlflow", "matplotlib", "torch", "pandas"} & set(sys.modules)))
"""
    assert run_python(code).strip() == "[]"
