"""What a compression ran on: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata

from loguru import logger

_PACKAGES = (
    "cur-modifier",
    "torch",
    "transformers",
    "llmcompressor",
    "compressed-tensors",
    "mlflow",
)
_GIT_WAIT_S = 1.0


def environment() -> dict[str, str]:
    """Versions of the packages that matter, Python, platform, CPU count, device, git commit.

    What is not there (a package, a commit) has no entry. Takes at most about a second.
    """
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": str(os.cpu_count()),
        "device": _device(),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _git_commit()
    if commit:
        found["git_commit"] = commit
    return found


def _device() -> str:
    try:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    except Exception as error:  # a broken driver must not stop a compression on the CPU
        logger.debug(f"MLflow: no GPU name: {error}")
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the repository that holds the working directory; None without one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=_GIT_WAIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
