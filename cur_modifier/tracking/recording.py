"""The run being written: its queue of jobs, its first failure, its end."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from functools import partial
from typing import TYPE_CHECKING

from loguru import logger

from cur_modifier.tracking.flatten import MAX_TAG_VALUE_LENGTH, cut
from cur_modifier.tracking.server import unreachable, without_passwords
from cur_modifier.tracking.worker import Worker

if TYPE_CHECKING:
    from mlflow import MlflowClient

# How long ``wait`` waits for the queue, and how often it asks whether the server still answers.
FINISH_WAIT_S = 60.0
PROBE_INTERVAL_S = 5.0
EXIT_WAIT_S = 10.0

ABANDONED = "the process ended before the compression finished"


class Recording:
    """What the tracker, the worker and the exit hook share about one run.

    It knows nothing of the tracker, so that a tracker nobody holds any more is collected, and its
    run closed, although the queue is alive.
    """

    def __init__(
        self, client: MlflowClient, run_id: str, *, owned: bool, uri: str, worker: Worker
    ) -> None:
        self.client = client
        self.run_id = run_id
        self._owned = owned
        self._uri = uri
        self._worker = worker
        self._failed: set[bool] = set()
        self._warned = False
        self._end: Future[None] | None = None
        self._pid = os.getpid()
        atexit.register(self._abandon_at_exit)

    def submit(self, what: str, job: Callable[[], None], *, artifact: bool) -> None:
        """Queue ``job``, which records ``what``; after the first failure, or the end, drop it.

        Artifacts and entries lie in two stores: where one is full, the other may well go on.
        """
        if artifact not in self._failed and self._end is None:
            self._worker.submit(partial(self._attempt, what, job, artifact))

    def close(self, error: str | None) -> None:
        """Queue the end of the run; the second call does nothing."""
        if self._end is None:
            self._end = self._worker.submit(partial(self._close, error))
            self._worker.stop()

    def wait(self) -> None:
        """Wait until the run is ended: at most FINISH_WAIT_S, less where the server is gone."""
        atexit.unregister(self._abandon_at_exit)
        deadline = time.monotonic() + FINISH_WAIT_S
        while not self._ended_within(min(PROBE_INTERVAL_S, deadline - time.monotonic())):
            # MLflow retries for minutes; without this question a dead server would cost
            # FINISH_WAIT_S.
            reason = unreachable(self._uri)
            if reason is None and time.monotonic() < deadline:
                continue
            self._warn(reason or f"the records are not written after {FINISH_WAIT_S:g} s")
            return

    def abandon(self) -> None:
        """Close the run as FAILED because nobody is left to finish it. Never waits."""
        # A forked child has no worker, and the run is its parent's.
        if os.getpid() == self._pid:
            self.close(ABANDONED)

    def _abandon_at_exit(self) -> None:
        self.abandon()
        self._ended_within(EXIT_WAIT_S)

    def _ended_within(self, seconds: float) -> bool:
        return self._end is None or not wait_for([self._end], max(seconds, 0)).not_done

    def _attempt(self, what: str, job: Callable[[], None], artifact: bool) -> None:
        if artifact in self._failed:
            return
        try:
            job()
        except Exception as error:
            self._failed.add(artifact)
            self._warn(f"{what}: {error}")

    def _close(self, error: str | None) -> None:
        try:
            if error is not None:
                value = cut(error, MAX_TAG_VALUE_LENGTH, key="error")
                self.client.set_tag(self.run_id, "error", value)
            if self._owned:
                status = "FINISHED" if error is None else "FAILED"
                self.client.set_terminated(self.run_id, status=status)
        except Exception as failure:
            self._warn(f"the end of the run: {failure}")

    def _warn(self, reason: str) -> None:
        """One warning for a run: what follows the first failure has the same cause."""
        message = without_passwords(
            f"MLflow: the record of run {self.run_id} at {self._uri} is incomplete: {reason}. The "
            "compression itself goes on. Check the server and its disk; to compress without a "
            "record, turn MLflow off in the recipe (mlflow: false)."
        )
        logger.log("DEBUG" if self._warned else "WARNING", message)
        self._warned = True
