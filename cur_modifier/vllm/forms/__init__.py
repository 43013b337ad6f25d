"""What is served for each form: one module a form, whose ``SERVED`` is its :class:`~.base.Served`.

The module of a form has the name that :data:`~cur_modifier.forms.sizes.FORMS` gives it. A part that
is not factored is served by :mod:`~.dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from cur_modifier.vllm.parts import Part, Schemes

from .base import Linears, Served, is_plain

__all__ = ["Linears", "Served", "is_plain", "served"]


def served(parts: Sequence[Part], schemes: Schemes) -> Served:
    """What is served for a part, or for several that share a skeleton."""
    spec = parts[0].spec
    module = "dense" if spec is None else spec.sizes.module
    make: Callable[[Sequence[Part], Schemes], Served]
    make = import_module(f"{__name__}.{module}").SERVED
    return make(parts, schemes)
