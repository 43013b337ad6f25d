"""Real stores and servers for the tracking tests."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from loguru import logger

import cur_modifier

SERVER_START_S = 120


@pytest.fixture(scope="session")
def mlflow():
    return pytest.importorskip("mlflow")


@pytest.fixture(scope="session")
def empty_database(mlflow, tmp_path_factory):
    """A database with MLflow's tables: making them takes seconds, copying them does not."""
    folder = tmp_path_factory.mktemp("mlflow")
    path = folder / "empty.db"
    before = os.getcwd()
    os.chdir(folder)  # the default experiment puts its artifacts below the working directory
    try:
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    finally:
        os.chdir(before)
    return path


@pytest.fixture
def clean_mlflow(mlflow, monkeypatch, tmp_path):
    """MLflow's process-wide settings as in a fresh process, and restored afterwards."""
    for name in ("TRACKING_URI", "EXPERIMENT_ID", "EXPERIMENT_NAME", "RUN_ID"):
        monkeypatch.setenv(f"MLFLOW_{name}", "")  # so that the deletion is undone in any case
        monkeypatch.delenv(f"MLFLOW_{name}")
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture
def store(mlflow, clean_mlflow, empty_database, tmp_path):
    """A client of a fresh sqlite store, which is also the current tracking URI."""
    path = shutil.copy(empty_database, tmp_path / "store.db")
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    return mlflow.MlflowClient()


class Server:
    """An ``mlflow server`` on a free loopback port, on its own database."""

    def __init__(self, database: Path, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._log = folder / "server.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                    *("--host", "127.0.0.1", "--port", str(port)),
                    *("--backend-store-uri", f"sqlite:///{shutil.copy(database, folder)}"),
                    *("--artifacts-destination", str(folder / "artifacts")),
                ],
                cwd=folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,  # the server is a process with children
            )

    def wait(self) -> None:
        deadline = time.monotonic() + SERVER_START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                requests.get(f"{self.uri}/health", timeout=1).raise_for_status()
                return
            except requests.RequestException:
                time.sleep(0.1)
        pytest.fail(f"mlflow server did not start:\n{self._log.read_text()}")

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="session")
def servers(empty_database, tmp_path_factory):
    """Two servers, started side by side because each takes ten seconds."""
    pair = [Server(empty_database, tmp_path_factory.mktemp("server")) for _ in range(2)]
    try:
        for server in pair:
            server.wait()
        yield pair
    finally:
        for server in pair:
            server.kill()


@pytest.fixture
def server(mlflow, servers, clean_mlflow):
    """A running server, which is also the current tracking URI."""
    mlflow.set_tracking_uri(servers[0].uri)
    return servers[0]


@pytest.fixture
def doomed_server(mlflow, servers, clean_mlflow):
    """A running server that a test may kill; one test only."""
    mlflow.set_tracking_uri(servers[1].uri)
    return servers[1]


@pytest.fixture
def warnings():
    """The loguru warnings of the test, as a list of messages."""
    messages = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


@pytest.fixture
def run_python():
    """Run code in a fresh process that has cur_modifier.tracking, and return what it prints.

    The parent package is a stub: what the registration in cur_modifier/__init__.py imports is not
    what these tests are about, and takes seconds.
    """
    stub = (
        "import sys, types; package = types.ModuleType('cur_modifier'); "
        f"package.__path__ = {list(cur_modifier.__path__)!r}; "
        "sys.modules['cur_modifier'] = package\n"
    )

    def run(code: str) -> str:
        result = subprocess.run([sys.executable, "-c", stub + code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
