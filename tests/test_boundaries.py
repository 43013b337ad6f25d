"""What the folders promise each other, where no linter looks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from cur_modifier.forms.sizes import FORMS

PACKAGE = Path(__file__).resolve().parent.parent / "cur_modifier"
WITHOUT_FORMS = ("modifiers", "passes", "structure", "training")
FORM_MODULES = {f"cur_modifier.forms.{sizes.module}" for sizes in FORMS.values()}
FACTORED = {
    node.name
    for path in (PACKAGE / "forms").glob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef) and node.name.endswith("Linear")
}


def forms_told_apart(source: str) -> list[str]:
    """Where code asks which form something is: by a comparison, a class, or an import of one."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if tells_apart(node)]


def tells_apart(node: ast.AST) -> bool:
    match node:
        case ast.Compare():
            return any(isinstance(n, ast.Constant) and n.value in FORMS for n in ast.walk(node))
        case ast.Call(func=ast.Name("isinstance" | "issubclass")):
            return any(isinstance(n, ast.Name) and n.id in FACTORED for n in ast.walk(node.args[1]))
        case ast.MatchClass(cls=ast.Name(name)):
            return name in FACTORED
        case ast.MatchValue(value=ast.Constant(value)):
            return value in FORMS
        case ast.ImportFrom():
            return node.module in FORM_MODULES
    return False


@pytest.mark.parametrize(
    "source",
    [
        "form == 'cur'",
        "'id' != form",
        "form in ('cur', 'x')",
        "form is 'low_rank'",
        "isinstance(module, FactoredLinear)",
        "isinstance(module, nn.Linear | RowIDLinear)",
        "match form:\n case 'id': pass",
        "match layer:\n case CURLinear(): pass",
        "from cur_modifier.forms.row_id import RowIDLinear",
    ],
)
def test_what_tells_forms_apart_is_found(source: str) -> None:
    assert forms_told_apart(source)


@pytest.mark.parametrize(
    "path",
    [path for folder in WITHOUT_FORMS for path in sorted((PACKAGE / folder).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_only_forms_know_forms(path: Path) -> None:
    assert forms_told_apart(path.read_text()) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "forms").glob("*.py")), ids=lambda p: p.name)
def test_what_is_shipped_imports_ours_from_its_own_folder(path: Path) -> None:
    """transformers looks for ``from .name import`` in one flat folder."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("cur_modifier"), ast.unparse(node)
            if node.level:
                assert node.level == 1 and node.module, ast.unparse(node)
                assert (path.parent / f"{node.module}.py").is_file(), ast.unparse(node)


def test_every_form_has_a_module_in_each_folder() -> None:
    for sizes in FORMS.values():
        for folder in ("linalg", "forms", "vllm/forms"):
            assert (PACKAGE / folder / f"{sizes.module}.py").is_file()
