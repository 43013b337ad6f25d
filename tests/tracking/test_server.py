"""The tracker against HTTP servers: alive, dead, dying, mute.

The bounds on seconds are generous; what they exclude is MLflow's own retrying, which takes minutes.
"""

import socket
import time

import pytest

from cur_modifier.tracking import NullTracker, recording, start, start_tracking

mlflow = pytest.importorskip("mlflow")
Figure = pytest.importorskip("matplotlib.figure").Figure


def test_a_live_server_gets_everything(server, warnings):
    tracker = start_tracking(run_name="over HTTP")
    tracker.log_params(
        {"rank": {"max": 256}, "long": "é" * 6000} | {f"p{i}": i for i in range(120)}
    )
    tracker.log_metrics({f"m{i}": i for i in range(1200)}, step=1)
    tracker.log_table([{"module": "a", "rank": 8}], "layers.csv")
    tracker.log_figure(Figure(), "figures/spectra.png")
    tracker.finish()

    assert warnings == []
    found = mlflow.search_runs(experiment_ids=["0"], filter_string="params.`rank.max` = '256'")
    assert list(found["run_id"]) == [tracker.run_id]
    assert found["status"][0] == "FINISHED"
    client = mlflow.MlflowClient()
    assert len(client.get_run(tracker.run_id).data.metrics) == 1200
    assert [file.path for file in client.list_artifacts(tracker.run_id, "figures")] == [
        "figures/spectra.png"
    ]
    assert list(mlflow.load_table("layers.json", run_ids=[tracker.run_id])["rank"]) == [8]


def test_a_server_killed_in_mid_run_costs_one_warning(doomed_server, warnings, monkeypatch):
    monkeypatch.setattr(recording, "PROBE_INTERVAL_S", 0.2)
    tracker = start_tracking()
    assert tracker.run_id is not None
    doomed_server.kill()
    begun = time.monotonic()
    tracker.log_metrics({"seconds": 1.0})
    tracker.log_text("x", "x.txt")
    assert time.monotonic() - begun < 2
    tracker.finish()
    tracker.finish(error="twice")
    assert time.monotonic() - begun < 20
    assert len(warnings) == 1
    assert doomed_server.uri in warnings[0]
    assert tracker.run_id in warnings[0]


def test_a_dead_server_costs_one_warning_and_little_time(clean_mlflow, warnings):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        mlflow.set_tracking_uri(uri)
        begun = time.monotonic()
        tracker = start_tracking()
        assert time.monotonic() - begun < 5
    assert isinstance(tracker, NullTracker)
    assert len(warnings) == 1
    assert uri in warnings[0]
    assert "refused" in warnings[0]
    assert "MLFLOW_TRACKING_URI" in warnings[0]


@pytest.fixture
def mute_server(clean_mlflow):
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        uri = f"http://127.0.0.1:{listening.getsockname()[1]}"
        mlflow.set_tracking_uri(uri)
        yield uri


def test_a_mute_server_costs_one_warning_and_little_time(mute_server, warnings):
    begun = time.monotonic()
    assert isinstance(start_tracking(), NullTracker)
    assert time.monotonic() - begun < 10
    assert len(warnings) == 1


def test_a_server_that_goes_mute_after_the_probe(mute_server, warnings, monkeypatch):
    monkeypatch.setattr(start, "unreachable", lambda uri: None)
    monkeypatch.setattr(start, "REMOTE_WAIT_S", 0.5)
    assert isinstance(start_tracking(), NullTracker)
    assert len(warnings) == 1
    assert "no run was opened within 0.5 s" in warnings[0]


def test_a_slow_store_delays_finish_by_a_bounded_time(server, warnings, monkeypatch):
    monkeypatch.setattr(recording, "FINISH_WAIT_S", 0.5)
    tracker = start_tracking()
    slow = mlflow.MlflowClient.log_batch
    monkeypatch.setattr(
        mlflow.MlflowClient, "log_batch", lambda *a, **k: (time.sleep(5), slow(*a, **k))
    )
    tracker.log_metrics({"seconds": 1.0})
    begun = time.monotonic()
    tracker.finish()
    assert time.monotonic() - begun < 4.5
    assert len(warnings) == 1
    assert "after 0.5 s" in warnings[0]
