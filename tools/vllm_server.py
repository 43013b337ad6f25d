"""``vllm serve`` as a child process: started, waited for, asked, stopped.

The demo, the serving tests and the benchmarks use it. vLLM lives in an environment of its own, so
its program is found beside the Python that ``CUR_SERVE_PYTHON`` names, else on the ``PATH``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CPU_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_INT4_W4A8": "0",  # 4-bit weights with 16-bit activations, on every CPU
}


class ServerError(RuntimeError):
    """The server did not start, or ended; the message ends with its log."""


class Client:
    """A server that runs, at ``url`` without a path."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")

    def get(self, path: str, *, timeout: float = 60) -> str:
        """The answer to a GET."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=timeout) as answer:
            return answer.read().decode()

    def json(self, path: str, *, timeout: float = 60) -> Any:
        """The JSON answer to a GET."""
        return json.loads(self.get(path, timeout=timeout))

    def post(self, path: str, body: Mapping[str, Any], *, timeout: float = 600) -> Any:
        """The JSON answer to a POST of ``body``."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)


class Server(Client):
    """A running ``vllm serve``.

    Attributes:
        process: the process that was started; its children are vLLM's engine and workers.
        log: the file that all of them write to.
        ended_by_itself: what ``stop`` said of it; None until then.
    """

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        super().__init__(url)
        self.process = process
        self.log = log
        self.ended_by_itself: bool | None = None

    def log_tail(self, lines: int = 40) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def errors(self) -> list[str]:
        """Exceptions in the log, each once. The first is the cause, and far from the log's end."""
        line = r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] *)?((?:\w+\.)*\w+(?:Error|Exception): .*)$"
        found = re.findall(line, self.log.read_text(errors="replace"), re.MULTILINE)
        return list(dict.fromkeys(found))

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            self.get("/health", timeout=5)
        except (urllib.error.URLError, OSError):
            return False
        return True


def vllm_program() -> Path:
    """Path of the ``vllm`` program.

    Raises:
        ServerError: there is none; the message says how to make the environment.
    """
    python = os.environ.get("CUR_SERVE_PYTHON")
    found = shutil.which("vllm", path=str(Path(python).parent) if python else None)
    if found is None:
        raise ServerError(
            f"no vllm program {f'beside {python}' if python else 'on the PATH'}. "
            "`make .venvs/serve` makes an environment with vLLM."
        )
    return Path(found)


@contextmanager
def serve(
    model: Path | str,
    *arguments: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Iterator[Server]:
    """Run ``vllm serve model arguments`` while the context lasts.

    Args:
        log: file for what the server prints.
        environment: variables beside the present ones and ``CPU_SETTINGS``.
        timeout: seconds to wait for the first answer.

    Raises:
        ServerError: no answer in time, or the server ended first.
    """
    port = free_port()
    with (
        log.open("wb") as output,
        # Its sockets: vLLM leaves them where they were.
        tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True) as sockets,
    ):
        process = subprocess.Popen(
            [str(vllm_program()), "serve", str(model), "--port", str(port), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={
                **CPU_SETTINGS,
                "VLLM_RPC_BASE_PATH": sockets,
                **os.environ,
                **(environment or {}),
            },
            start_new_session=True,  # a group of its own, so that all of it can be ended
        )
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            deadline = time.monotonic() + timeout
            while not server.ready():
                if process.poll() is not None:
                    causes = "\n".join(server.errors()[:3])
                    raise ServerError(
                        f"vllm serve {model} ended with status {process.returncode}.\n{causes}\n"
                        f"{log} ends:\n{server.log_tail()}"
                    )
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"vllm serve {model} did not answer within {timeout:.0f} s:\n"
                        f"{server.log_tail()}"
                    )
                time.sleep(0.5)
            try:
                yield server
            except Exception as error:  # the client's; what went wrong in the server is in the log
                error.add_note(f"{log} ends:\n{server.log_tail()}")
                raise
        finally:
            server.ended_by_itself = stop(process)


def stop(process: subprocess.Popen[bytes], *, patience: float = 30) -> bool:
    """Ask the server to end, and end what is left of its group.

    Returns:
        Whether the server ended by itself, before or within ``patience`` seconds of the SIGTERM.
    """
    by_itself = True
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            by_itself = False
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return by_itself


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
