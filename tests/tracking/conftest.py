"""Real stores and servers for the tracking tests."""

import os
import shutil
import subprocess
import sys

import pytest
from loguru import logger

import cur_modifier
from tools.mlflow_ui import MlflowServer


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


@pytest.fixture(scope="session")
def servers(empty_database, tmp_path_factory):
    """Two servers, started side by side because each takes ten seconds."""
    folders = [tmp_path_factory.mktemp("server") for _ in range(2)]
    pair = [MlflowServer(f"sqlite:///{shutil.copy(empty_database, f)}", f) for f in folders]
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
