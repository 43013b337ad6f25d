"""Forms by name."""

from __future__ import annotations

from importlib import import_module

import pytest

from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import FORMS


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_found_where_its_module_says(name: str) -> None:
    form = find_form(name)
    assert form.name == name == form.layer.form and form.sizes is FORMS[name]
    assert callable(import_module(f"cur_modifier.linalg.{form.sizes.module}").solve)


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match=r"no form 'svd'; choose cur, id"):
        find_form("svd")
