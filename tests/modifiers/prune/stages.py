"""A stage for the tests' tiny model: 24 neurons and two key/value heads in each of three layers."""

from __future__ import annotations

from typing import Any

from cur_modifier.modifiers.prune.modifier import IDPruningModifier

LAYERS = 3


def stage(**fields: Any) -> IDPruningModifier:
    quick: dict[str, Any] = {"multiple_of": 4, "sensitivity": {"samples": 2}, "mlflow": False}
    return IDPruningModifier(**quick | {"budget": {"ratio": 0.8}} | fields)
