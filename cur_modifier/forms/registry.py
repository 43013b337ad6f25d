"""Forms by name."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from .form import Form
from .sizes import FORMS

__all__ = ["find_form"]


@cache
def find_form(name: str) -> Form:
    """The form of a name in :data:`~.sizes.FORMS`: the ``FORM`` of its module.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in FORMS:
        raise ValueError(f"there is no form {name!r}; choose {', '.join(FORMS)}.")
    form: Form = import_module(f".{FORMS[name].module}", __package__).FORM
    return form
