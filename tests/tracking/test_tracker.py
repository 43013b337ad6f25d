"""The interface of a tracker: nothing raises, and the one that records nothing is whole."""

from __future__ import annotations

import inspect

import pytest

from cur_modifier.tracking.mlflow_tracker import MlflowTracker
from cur_modifier.tracking.tracker import NullTracker, Tracker, never_raises


class Broken(NullTracker):
    run_id = "a1"

    @never_raises
    def log_text(self, text: str, artifact: str) -> None:
        """Fails."""
        raise OSError(f"no room for {artifact}")


def test_what_cannot_be_prepared_costs_a_warning(warnings: list[str]) -> None:
    Broken().log_text("text", artifact="a.txt")
    assert warnings == [
        "MLflow: log_text leaves something out of run a1: OSError: no room for a.txt"
    ]
    assert Broken.log_text.__doc__ == "Fails."


def test_an_interrupt_is_no_error_of_the_record() -> None:
    class Interrupted(NullTracker):
        @never_raises
        def log_text(self, text: str, artifact: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted().log_text("text", "a.txt")


@pytest.mark.parametrize("kind", [NullTracker, MlflowTracker])
def test_every_tracker_has_every_method_with_one_signature(kind: type[Tracker]) -> None:
    for name in Tracker.__abstractmethods__:
        wanted, given = (inspect.signature(getattr(each, name)) for each in (Tracker, kind))
        assert list(wanted.parameters) == list(given.parameters), name


def test_nothing_is_recorded_by_the_null_tracker() -> None:
    tracker = NullTracker()
    tracker.log_params({"a": 1})
    tracker.log_metrics({"a": 1.0}, step=1)
    tracker.log_text("a", "a.txt")
    tracker.log_table([{"a": 1}], "a.csv")
    tracker.set_tags({"a": "b"})
    tracker.finish(error="an error")
    assert tracker.run_id is None
