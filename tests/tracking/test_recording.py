"""A run being written: jobs until the first failure, and one end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cur_modifier.tracking import recording as module
from cur_modifier.tracking.recording import ABANDONED, Recording
from cur_modifier.tracking.worker import Worker

mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def recording(store: Any) -> Iterator[Callable[..., Recording]]:
    """``recording(owned=)`` on a run of a real store."""
    made: list[Recording] = []

    def make(*, owned: bool = True) -> Recording:
        run_id = store.create_run("0").info.run_id
        uri = mlflow.get_tracking_uri()
        made.append(Recording(store, run_id, owned=owned, uri=uri, worker=Worker("recording")))
        return made[-1]

    yield make
    for each in made:
        each.close(None)
        each.wait()


def tag(store: Any, run: Recording, value: str) -> Callable[[], None]:
    return lambda: store.set_tag(run.run_id, value, value)


def found(store: Any, run: Recording) -> tuple[str, set[str]]:
    data = store.get_run(run.run_id)
    ours = {key for key in data.data.tags if not key.startswith("mlflow.")}
    return data.info.status, ours


def fail() -> None:
    raise OSError("the disk is full")


def test_jobs_are_written_and_the_run_is_finished(store: Any, recording: Any) -> None:
    run = recording()
    for value in ("a", "b"):
        run.submit(value, tag(store, run, value), artifact=False)
    run.close(None)
    run.wait()
    assert found(store, run) == ("FINISHED", {"a", "b"})


def test_an_error_fails_the_run_and_the_second_end_counts_for_nothing(
    store: Any, recording: Any
) -> None:
    run = recording()
    run.close("rank 9 > 8")
    run.close(None)
    run.wait()
    assert found(store, run) == ("FAILED", {"error"})
    assert store.get_run(run.run_id).data.tags["error"] == "rank 9 > 8"


def test_a_run_of_the_user_is_left_running(store: Any, recording: Any) -> None:
    run = recording(owned=False)
    run.close("broken")
    run.wait()
    assert found(store, run) == ("RUNNING", {"error"})


@pytest.mark.parametrize("artifact", [True, False])
def test_after_a_failure_only_the_other_store_is_written(
    store: Any, recording: Any, warnings: list[str], artifact: bool
) -> None:
    run = recording()
    run.submit("spectra.png", fail, artifact=artifact)
    run.submit("same", tag(store, run, "same"), artifact=artifact)
    run.submit("other", tag(store, run, "other"), artifact=not artifact)
    run.submit("again", fail, artifact=not artifact)
    run.close(None)
    run.wait()
    assert found(store, run) == ("FINISHED", {"other"})
    [warning] = warnings
    assert f"run {run.run_id}" in warning and "spectra.png: the disk is full" in warning
    assert "mlflow: false" in warning


def test_what_comes_after_the_end_is_dropped(store: Any, recording: Any) -> None:
    run = recording()
    run.close(None)
    run.submit("late", tag(store, run, "late"), artifact=False)
    run.wait()
    assert found(store, run) == ("FINISHED", set())


def test_an_abandoned_run_says_so(store: Any, recording: Any) -> None:
    run = recording()
    run.abandon()
    run.wait()
    assert store.get_run(run.run_id).data.tags["error"] == ABANDONED


def test_a_forked_child_leaves_its_parent_s_run_alone(store: Any, recording: Any) -> None:
    run = recording()
    run._pid += 1
    run.abandon()
    assert found(store, run)[0] == "RUNNING"


def test_a_queue_that_does_not_empty_is_left_behind(
    recording: Any, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    monkeypatch.setattr(module, "FINISH_WAIT_S", 0.05)
    monkeypatch.setattr(module, "PROBE_INTERVAL_S", 0.01)
    gate, run = threading.Event(), recording()
    run.submit("slow", lambda: gate.wait(30), artifact=False)
    run.close(None)
    run.wait()
    [warning] = warnings
    assert "the records are not written after 0.05 s" in warning
    gate.set()
