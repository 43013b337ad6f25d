"""A tiny model, calibration data, and the recipe that a stage finds itself in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements are kept for one test alone: a later one may replace what is measured."""
    monkeypatch.setenv("CUR_MODIFIER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def model(small_llama: Callable[..., Any]) -> Any:
    return small_llama(0, num_hidden_layers=3)


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (2, 12), generator=generator)} for _ in range(4)]


@pytest.fixture
def state(model: Any, batches: Any) -> Any:
    """What llm-compressor hands to a stage, as far as our stages look."""
    core = pytest.importorskip("llmcompressor.core")
    state = core.State(model=model)
    state.data.calib = batches
    return state


@pytest.fixture
def recipe() -> Iterator[Callable[..., Any]]:
    """``recipe(*modifiers)`` makes them the recipe of the active session, and gives the first."""
    core = pytest.importorskip("llmcompressor.core")
    from llmcompressor.recipe import Recipe

    with core.create_session() as session:

        def given(*modifiers: Any) -> Any:
            session.lifecycle.recipe = Recipe.from_modifiers(list(modifiers))
            return modifiers[0]

        yield given


@pytest.fixture
def calibrated(state: Any, recipe: Callable[..., Any]) -> Callable[..., Any]:
    """``calibrated(stage, *later)`` takes a stage through its events up to the end of the
    calibration, as llm-compressor's sequential pipeline does."""

    def run(stage: Any, *later: Any) -> Any:
        recipe(stage, *later)
        stage.on_initialize(state)
        recipe(stage)  # each stage has a pass of its own
        stage.on_calibration_start(state, None)
        if stage.requires_calibration_data:
            with torch.no_grad():
                for layer in state.model.model.layers:
                    for batch in state.data.calib:
                        state.model(**batch, use_cache=False)
                    stage.on_sequential_epoch_end(state, None, list(layer.modules()))
        stage.on_calibration_end(state, None)
        return stage

    return run


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Every message of the log from INFO on."""
    from loguru import logger

    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="INFO")
    yield messages
    logger.remove(sink)


@pytest.fixture
def tracker() -> Any:
    """A tracker that remembers what it is told."""
    from cur_modifier.tracking import NullTracker

    class Remembering(NullTracker):
        def __init__(self) -> None:
            self.metrics: list[tuple[dict[str, float], int | None]] = []
            self.ended: list[Any] = []

        def log_metrics(self, metrics: Any, *, step: int | None = None) -> None:
            self.metrics.append((dict(metrics), step))

        def finish(self, *, error: Any = None) -> None:
            self.ended.append(error)

    return Remembering()
