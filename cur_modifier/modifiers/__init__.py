"""Stages for llm-compressor recipes."""

from llmcompressor.modifiers.factory import ModifierFactory

from cur_modifier.modifiers.cur import CURModifier

__all__ = ["CURModifier", "register"]


def register() -> None:
    """Let YAML recipes name ``CURModifier``. Harmless when repeated."""
    ModifierFactory.register("CURModifier", CURModifier)
