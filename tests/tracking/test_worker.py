"""Jobs in order, in a thread that holds nobody up."""

from __future__ import annotations

import contextvars
import threading

import pytest

from cur_modifier.tracking.worker import Worker


@pytest.fixture
def worker():
    worker = Worker("test-worker")
    yield worker
    worker.stop()


def test_jobs_run_in_their_order_in_one_other_thread(worker: Worker) -> None:
    done: list[int] = []
    threads: set[str] = set()

    def job(number: int) -> int:
        done.append(number)
        threads.add(threading.current_thread().name)
        return number

    futures = [worker.submit(lambda k=k: job(k)) for k in range(50)]
    assert [future.result(30) for future in futures] == done == list(range(50))
    assert threads == {"test-worker"}


def test_submitting_does_not_wait(worker: Worker) -> None:
    gate = threading.Event()
    first = worker.submit(lambda: gate.wait(30))
    second = worker.submit(lambda: "later")
    assert not first.done() and not second.done()
    gate.set()
    assert first.result(30) and second.result(30) == "later"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_is_the_future_s_and_the_next_job_still_runs(
    worker: Worker, error: type[BaseException]
) -> None:
    def fail() -> None:
        raise error("broken")

    failed = worker.submit(fail)
    after = worker.submit(lambda: 1)
    assert isinstance(failed.exception(30), error) and after.result(30) == 1


def test_the_context_is_that_of_the_maker() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    token = variable.set("the maker's")
    worker = Worker("with-context")
    variable.reset(token)
    assert worker.submit(variable.get).result(30) == "the maker's"
    worker.stop()


def test_the_thread_ends_after_what_was_submitted_and_never_holds_up_an_exit() -> None:
    worker = Worker("ending")
    thread = worker.submit(threading.current_thread).result(30)
    assert thread.daemon
    last = worker.submit(lambda: "last")
    worker.stop()
    assert last.result(30) == "last"
    thread.join(30)
    assert not thread.is_alive()
