"""The tests mirror the package: one file for each module, in the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "cur_modifier"
MODULES = sorted(
    path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"
)


def test_modules_are_found() -> None:
    assert Path("linalg/selection/deim.py") in MODULES


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_has_its_test_file(module: Path) -> None:
    wanted = module.with_name(f"test_{module.name}")
    assert (TESTS / wanted).is_file(), f"cur_modifier/{module} has no tests: add tests/{wanted}"
