"""What a compression ran on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from cur_modifier.tracking.environment import environment


def test_versions_are_those_that_run() -> None:
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["torch"] == metadata.version("torch")
    assert found["cpu_count"] == str(os.cpu_count()) and found["device"]
    assert all(isinstance(value, str) for value in found.values())


def test_packages_that_are_missing_have_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's name of the module is that of its function.
    module = sys.modules["cur_modifier.tracking.environment"]
    monkeypatch.setattr(module, "_PACKAGES", ("torch", "no-such-package"))
    assert "torch" in environment() and "no-such-package" not in environment()


def test_the_commit_is_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "git_commit" not in environment()
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert environment()["git_commit"] == head.strip()


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "git_commit" not in environment()
