"""Structured compression of language models as a stage of llm-compressor recipes.

Importing this package registers ``CURModifier``, ``CURHealModifier`` and ``IDPruningModifier`` with
llm-compressor and the quantizer ``cur`` with transformers, where they are installed. Where they are
not (a serving environment, a laptop that only reads schemas), it imports all the same.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cur_modifier.modifiers import CURHealModifier as CURHealModifier
    from cur_modifier.modifiers import CURModifier as CURModifier
    from cur_modifier.modifiers import IDPruningModifier as IDPruningModifier

__all__ = ["CURHealModifier", "CURModifier", "IDPruningModifier"]


def _register() -> None:
    if find_spec("transformers") is not None:
        from cur_modifier.transformers import register as register_quantizer

        register_quantizer()
    if find_spec("llmcompressor") is not None:
        from cur_modifier.modifiers import register as register_modifier

        register_modifier()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("llmcompressor") is None:
        raise ImportError(
            f"{name} needs llm-compressor, which is not installed here. "
            "Install it with: pip install 'cur-modifier[compress]'"
        )
    from cur_modifier import modifiers

    return getattr(modifiers, name)


_register()
