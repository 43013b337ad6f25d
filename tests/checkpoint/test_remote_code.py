"""The code that a checkpoint ships reads it without cur_modifier."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from itertools import chain, combinations
from pathlib import Path

import pytest
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from cur_modifier.checkpoint.remote_code import FOLDER, auto_classes, ship
from cur_modifier.forms.sizes import FORMS

SUBSETS = list(chain.from_iterable(combinations(FORMS, k) for k in range(len(FORMS) + 1)))


@pytest.mark.parametrize("forms", SUBSETS, ids="+".join)
def test_modules_import_each_other_and_only_the_needed_forms_come(
    tmp_path: Path, forms: tuple[str, ...]
) -> None:
    assert ship(tmp_path, LlamaForCausalLM, forms) == f"{FOLDER}/modeling_cur.LlamaForCausalLM"
    folder = tmp_path / FOLDER
    shipped = {path.stem for path in folder.iterdir()}
    assert [path for path in folder.iterdir() if path.suffix != ".py"] == []
    needed = {FORMS[form].module for form in forms}
    assert shipped & {sizes.module for sizes in FORMS.values()} == needed
    imported: set[str] = set()
    for path in folder.iterdir():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("cur_modifier"), path
                if node.level:
                    assert node.level == 1 and node.module in shipped, ast.unparse(node)
                    imported.add(node.module)
    assert shipped - imported == {"modeling_cur"}  # transformers copies what is imported


def test_every_shipped_form_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ship(tmp_path, LlamaForCausalLM, FORMS)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    try:
        modeling = import_module(f"{FOLDER}.modeling_cur")
        assert issubclass(modeling.LlamaForCausalLM, LlamaForCausalLM)
        find_form = import_module(f"{FOLDER}.registry").find_form
        shape = import_module(f"{FOLDER}.sizes").Shape(6, 5, 2)
        for name, sizes in FORMS.items():
            layer = find_form(name).build(shape, bias=True)
            assert type(layer).__module__ == f"{FOLDER}.{sizes.module}"
            assert layer.stored_parameters == sizes.parameters(6, 5, 2, bias=True)
    finally:
        for name in {name for name in sys.modules if name.startswith(FOLDER)} - before:
            del sys.modules[name]


def test_a_second_save_writes_over_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        ship(tmp_path, LlamaForCausalLM, ["id"])
    (tmp_path / FOLDER / "base.py").write_text("broken")
    ship(tmp_path, LlamaForCausalLM, ["id"])
    assert (tmp_path / FOLDER / "base.py").read_text() != "broken"


@pytest.mark.parametrize(
    ("model_class", "expected"),
    [
        (LlamaForCausalLM, ["AutoModelForCausalLM"]),
        (GPT2LMHeadModel, ["AutoModelForCausalLM"]),  # which is listed for pretraining, too
        (BertForMaskedLM, ["AutoModelForMaskedLM"]),
        (nn.Linear, ["AutoModelForCausalLM"]),
    ],
)
def test_models_are_found_by_their_auto_class(model_class: type, expected: list[str]) -> None:
    assert auto_classes(model_class) == expected
    assert "AutoModel" in auto_classes(BertModel)
