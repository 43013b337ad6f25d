"""Both engines answer what the stage asks of either."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.cur.engine import Engine
from cur_modifier.modifiers.cur.hooks import HookEngine
from cur_modifier.modifiers.cur.layerwise import LayerwiseEngine


@pytest.mark.parametrize("engine", [HookEngine, LayerwiseEngine])
@pytest.mark.parametrize("event", ["start", "layer_done", "unfitted"])
def test_every_event_has_one_signature(engine: type, event: str) -> None:
    wanted, given = (inspect.signature(getattr(each, event)) for each in (Engine, engine))
    assert list(wanted.parameters) == list(given.parameters)
