"""Packages find each other without `sys.path`, and their imports go one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cur_modifier", "mlflow_projects", "recipes", "tools")
# Each may import itself and these. `cur_modifier` reaches for `tools` where a clone has it.
ALLOWED = {
    "cur_modifier": {"tools"},
    "mlflow_projects": {"cur_modifier", "tools"},
    "recipes": {"cur_modifier", "tools"},
    "tools": set(),
}


def edits_of_the_path(source: str) -> Iterator[int]:
    """Lines that assign to ``sys.path`` or a part of it, or call a method of it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
            changed = [t.value if isinstance(t, ast.Subscript) else t for t in targets]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changed = [node.func.value]
        else:
            continue
        if any(ast.unparse(target) == "sys.path" for target in changed):
            yield node.lineno


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import sys\nsys.path[:0] = ['tools']", [2]),
        ("sys.path[0] = 'tools'", [1]),
        ("sys.path.insert(0, 'tools')", [1]),
        ("sys.path += ['tools']", [1]),
        ("sys.path = []", [1]),
        ("del sys.path[0]", [1]),
        ("print(sys.path, sys.path[0], os.path.join('a', 'b'))", []),
    ],
)
def test_an_edit_of_the_path_is_found(source: str, lines: list[int]) -> None:
    assert list(edits_of_the_path(source)) == lines


def test_no_module_edits_the_path() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in edits_of_the_path(file.read_text())
    ]
    assert not found


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    """All imports, also those inside functions and those that only a type checker runs."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert "mlflow_projects.bench.quality.__main__" in graph.modules
    return graph


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_below_it(imports: grimp.ImportGraph, package: str) -> None:
    found = {
        (module, other)
        for module in imports.modules
        if module.partition(".")[0] == package
        for other in imports.find_modules_directly_imported_by(module)
        if other.partition(".")[0] not in {package, *ALLOWED[package]}
    }
    assert not found


@pytest.mark.parametrize("package", ["mlflow_projects", "recipes", "tools"])
def test_no_modules_import_each_other_in_a_circle(imports: grimp.ImportGraph, package: str) -> None:
    own = {module for module in imports.modules if module.partition(".")[0] == package}
    order = TopologicalSorter(
        {module: imports.find_modules_directly_imported_by(module) & own for module in own}
    )
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' ← '.join(error.args[1])}")
