"""The serving plugin on single vLLM Linears, in the environment that serves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from served import by_script

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
    return by_script(SCRIPT.name, timeout=600)


@pytest.mark.parametrize("name", NAMES)
def test_plugin(name: str, outcomes: dict[str, str | None]) -> None:
    assert outcomes[name] is None, outcomes[name]
