"""What the documents name exists: files, make targets, modules, options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name + path.name)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / link).exists(), f"{document.name} links to {link}"
    for script in re.findall(r"python ([\w/]+\.py)", text):
        assert (ROOT / script).exists(), f"{document.name} runs {script}"
    for module in re.findall(r"python -m (cur_modifier[\w.]*)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{document.name} runs {module}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for target in re.findall(r"`?make ([a-z][\w-]*)`?(?=[\s`#])", text):
        assert target in targets, f"{document.name} says make {target}"


def test_no_placeholder_is_left() -> None:
    for document in DOCUMENTS:
        assert "@@" not in document.read_text()
