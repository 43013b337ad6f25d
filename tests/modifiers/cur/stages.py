"""Stages on the tiny model, for the tests of their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LAYER = "model.layers.1"
Q, K, V, OUT, GATE, UP, DOWN = (
    f"{LAYER}.{name}_proj"
    for name in (
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "self_attn.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    )
)


def stage(**fields: Any) -> Any:
    """A stage that factors one layer, at rank 4, and logs nothing."""
    from cur_modifier.modifiers.cur.modifier import CURModifier

    given: dict[str, Any] = {
        "targets": ["re:.*_proj$"],
        "form": "id",
        "rank": {"fixed": 4},
        "layers": {"select": [1]},
        "mlflow": False,
    }
    return CURModifier(**given | fields)


def planned(settings: Any, model: Any, batches: Any, recipe: Callable[..., Any]) -> Any:
    """The stage's plan."""
    from cur_modifier.modifiers.cur.plan import check, make_plan

    recipe(settings)
    return make_plan(check(settings, model, batches), model, batches)


def prepared(settings: Any, model: Any, batches: Any, recipe: Callable[..., Any]) -> Any:
    """The stage's modules, in the model, and how they are fitted."""
    from cur_modifier.modifiers.cur.fitting import Fitting
    from cur_modifier.modifiers.cur.install import install
    from cur_modifier.modifiers.cur.journal import FactoringJournal

    plan = planned(settings, model, batches, recipe)
    journal = FactoringJournal(model, enabled=False)
    installed, journal.records = install(model, plan, settings)
    return installed, Fitting(plan, journal)
