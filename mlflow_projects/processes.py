"""Work in a process of its own: its peak memory is the work's and gone with it, its crash too."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["apart", "peak_rss_bytes"]

Result = TypeVar("Result")


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """What ``function`` of a module gives, in a fresh process, which an interrupted call takes with
    it.

    Raises:
        RuntimeError: the process ended without a result. What it raised is on the standard error.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, arguments, sender))
    process.start()
    sender.close()  # the process holds the only other one, so its end ends the wait
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        reason = (
            "killed, perhaps for memory" if process.exitcode == -signal.SIGKILL else "see above"
        )
        raise RuntimeError(f"its process ended with status {process.exitcode} ({reason})") from None
    finally:
        process.kill()
        process.join()


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # exact; rusage starts from the size of the process that spawned this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _send(function: Callable[..., Any], arguments: tuple[Any, ...], sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one ends this
    sender.send(function(*arguments))
