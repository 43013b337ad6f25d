"""The serving plugin on single vLLM Linears, in the environment that serves."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest
from served import vllm_server

pytestmark = pytest.mark.serve

SCRIPT = Path(__file__).parent / "plugin_checks.py"
NAMES = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef)
    and any(isinstance(d, ast.Name) and d.id == "check" for d in node.decorator_list)
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """What went wrong, by check."""
    python = vllm_server.vllm_program().with_name("python")
    done = subprocess.run([str(python), str(SCRIPT)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_plugin(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]
