"""The code that a checkpoint ships: it loads where cur_modifier is not installed.

transformers copies a modeling file and what it imports relatively, from one flat folder. The
modules of :mod:`cur_modifier.forms` are written so, and are copied as they are.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterable
from pathlib import Path

import cur_modifier.forms
from cur_modifier.forms.sizes import FORMS

__all__ = ["FOLDER", "auto_classes", "ship"]

FOLDER = "cur_code"
_MODELING = '''"""Loads this factored checkpoint where cur_modifier is not installed."""

from {module} import {name} as _Base

{forms}
from .quantizer import register

register()


class {name}(_Base):
    """{name} whose factored layers are rebuilt by the quantizer registered above."""
'''


def ship(directory: Path, model_class: type, forms: Iterable[str]) -> str:
    """Put the reader of a checkpoint into ``directory``.

    Args:
        model_class: of transformers itself.
        forms: names of the forms that the checkpoint holds.

    Returns:
        The reference to the reader's model class, as ``auto_map`` has it.
    """
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    modules = sorted({FORMS[form].module for form in forms})
    source = Path(next(iter(cur_modifier.forms.__path__)))
    for name in _needed(source, ["quantizer", *modules]):
        shutil.copyfile(source / f"{name}.py", folder / f"{name}.py")
    # The registry finds them by name; transformers copies what is imported.
    imports = "\n".join(f"from .{name} import FORM as _{name}  # noqa: F401" for name in modules)
    (folder / "modeling_cur.py").write_text(
        _MODELING.format(module=model_class.__module__, name=model_class.__name__, forms=imports)
    )
    return f"{FOLDER}/modeling_cur.{model_class.__name__}"


def auto_classes(model_class: type) -> list[str]:
    """Names of the auto classes by which transformers builds a model of that class.

    A causal language model has one. Others, as encoders with a head, can have several.
    """
    from transformers.models.auto import modeling_auto

    causal = "AutoModelForCausalLM"
    found = [
        name
        for name, auto in vars(modeling_auto).items()
        if name.startswith("AutoModel")
        and model_class.__name__ in auto._model_mapping._model_mapping.values()
    ]
    return [causal] if causal in found or not found else found


def _needed(folder: Path, names: Iterable[str]) -> list[str]:
    """The modules of a folder that are named, and all that those import from it."""
    needed: list[str] = []
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.append(name)
        tree = ast.parse((folder / f"{name}.py").read_text())
        waiting += [
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        ]
    return sorted(needed)
