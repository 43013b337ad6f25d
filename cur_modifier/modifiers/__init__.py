"""Stages for llm-compressor recipes."""

from llmcompressor.modifiers.factory import ModifierFactory

from cur_modifier.modifiers.cur import CURModifier
from cur_modifier.modifiers.heal import CURHealModifier

__all__ = ["CURHealModifier", "CURModifier", "register"]


def register() -> None:
    """Let YAML recipes name our stages. Harmless when repeated."""
    ModifierFactory.register("CURModifier", CURModifier)
    ModifierFactory.register("CURHealModifier", CURHealModifier)
