"""Which run to write, and whether to write one at all."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from loguru import logger

from cur_modifier.tracking.environment import environment
from cur_modifier.tracking.mlflow_tracker import MlflowTracker
from cur_modifier.tracking.recording import Recording
from cur_modifier.tracking.server import PROBE_WAIT_S, is_remote, unreachable, without_passwords
from cur_modifier.tracking.tracker import NullTracker, Tracker
from cur_modifier.tracking.worker import Worker

if TYPE_CHECKING:
    from mlflow import MlflowClient

# How long a server that answered the probe may take to open the run. A local database is created
# on first use, which takes seconds on a slow disk.
REMOTE_WAIT_S = 15.0
LOCAL_WAIT_S = 120.0


def start_tracking(*, enabled: bool = True, run_name: str | None = None) -> Tracker:
    """The tracker of one compression; it never raises.

    The run is the user's active one (``mlflow.start_run``), or the one that MLFLOW_RUN_ID names
    (``mlflow run``); ``finish`` leaves those running. Otherwise it is a new run in the experiment
    that ``mlflow.start_run`` would choose. It does not become the active run of the user's code.

    Nothing is recorded if ``enabled`` is false, if mlflow is not installed, on all ranks of
    torch.distributed but the first, and, with one warning, if no run can be opened. A server that
    does not answer costs PROBE_WAIT_S; one that answers but opens no run, REMOTE_WAIT_S.

    Args:
        run_name: the name of a new run; MLflow invents one if None.
    """
    if not enabled or not _is_first_rank():
        return NullTracker()
    if importlib.util.find_spec("mlflow") is None:
        logger.debug("MLflow: nothing is recorded, because mlflow is not installed.")
        return NullTracker()
    uri = "an unknown address"
    worker = Worker("cur-modifier-mlflow")
    try:
        import mlflow

        uri = mlflow.get_tracking_uri()
        active = mlflow.active_run()
        joined = active.info.run_id if active else os.environ.get("MLFLOW_RUN_ID")
        client, run_id = _open(worker, uri, joined, run_name)
    except Exception as error:  # also mlflow's import, which other packages' versions can break
        worker.stop()
        message = (
            f"MLflow: nothing is recorded, because no run can be opened at {uri}: {error}. The "
            "compression goes on. Start the server, correct MLFLOW_TRACKING_URI, or turn MLflow "
            "off in the recipe (mlflow: false)."
        )
        logger.warning(without_passwords(message))
        return NullTracker()
    recording = Recording(client, run_id, owned=joined is None, uri=uri, worker=worker)
    tracker = MlflowTracker(recording)
    found = environment()
    tracker.set_tags({f"environment.{key}": value for key, value in found.items()})
    tracker.log_text(json.dumps(found, indent=2) + "\n", "environment.json")
    return tracker


def _is_first_rank() -> bool:
    # Where torch is not imported, no process group can be initialised.
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return True
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _open(
    worker: Worker, uri: str, joined: str | None, run_name: str | None
) -> tuple[MlflowClient, str]:
    """The client and the run; both steps in the worker, so that a stuck one can be left behind.

    Raises:
        ConnectionError: the server does not answer in time.
        Exception: whatever MLflow raises.
    """
    try:
        reason = worker.submit(lambda: unreachable(uri)).result(PROBE_WAIT_S)
    except TimeoutError:
        reason = f"no answer within {PROBE_WAIT_S:g} s"
    if reason is not None:
        raise ConnectionError(reason)

    opened = worker.submit(lambda: _open_run(uri, joined, run_name))
    seconds = REMOTE_WAIT_S if is_remote(uri) else LOCAL_WAIT_S
    try:
        return opened.result(seconds)
    except TimeoutError:
        if joined is None:
            opened.add_done_callback(_end_late_run)
        raise ConnectionError(f"no run was opened within {seconds:g} s") from None


def _open_run(uri: str, joined: str | None, run_name: str | None) -> tuple[MlflowClient, str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    if joined is not None:
        client.get_run(joined)  # raises if it does not exist
        return client, joined
    return client, _create_run(client, run_name)


def _create_run(client: MlflowClient, run_name: str | None) -> str:
    """A new run where ``mlflow.start_run`` would open it, with the tags it would give it.

    ``mlflow.start_run`` itself would make the run the active one. That it takes the experiment from
    ``_get_experiment_id`` is not part of MLflow's interface; tests/tracking/test_start.py fails
    where that changes.
    """
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.tracking.fluent import _get_experiment_id

    experiment_id: Any = _get_experiment_id()  # None on Databricks, which has its own default
    run = client.create_run(experiment_id, tags=resolve_tags(), run_name=run_name)
    return str(run.info.run_id)


def _end_late_run(opened: Future[tuple[MlflowClient, str]]) -> None:
    """Mark a run FAILED that was opened after everybody had stopped waiting for it."""
    if opened.exception() is None:
        client, run_id = opened.result()
        client.set_tag(run_id, "error", "the server took too long to open the run")
        client.set_terminated(run_id, status="FAILED")
