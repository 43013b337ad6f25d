"""Stages for llm-compressor recipes."""

from llmcompressor.modifiers.factory import ModifierFactory

from cur_modifier.modifiers.cur.modifier import CURModifier
from cur_modifier.modifiers.heal.modifier import CURHealModifier
from cur_modifier.modifiers.prune.modifier import IDPruningModifier

__all__ = ["CURHealModifier", "CURModifier", "IDPruningModifier", "register"]


def register() -> None:
    """Let YAML recipes name our stages. Harmless when repeated."""
    ModifierFactory.register("CURModifier", CURModifier)
    ModifierFactory.register("CURHealModifier", CURHealModifier)
    ModifierFactory.register("IDPruningModifier", IDPruningModifier)
