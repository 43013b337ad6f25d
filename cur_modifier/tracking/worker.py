"""A thread that runs jobs in order, so that a slow server slows nobody else."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """One daemon thread that runs jobs in the order of their submission.

    Not a ThreadPoolExecutor: Python waits for those threads when it exits, and a job may be stuck
    for minutes in MLflow's retries. ``submit`` may be called from finalizers (SimpleQueue.put is
    reentrant).
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # MLflow keeps the user's workspace in a context variable.
        context = contextvars.copy_context()
        threading.Thread(
            target=context.run, args=(_work, self._jobs), name=name, daemon=True
        ).start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue ``job``; the future gets its result or its exception."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._jobs.put(run)
        return future

    def stop(self) -> None:
        """End the thread after the jobs submitted so far; submit nothing afterwards."""
        self._jobs.put(None)


def _work(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
