"""The parts of a recipe that several stages have."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.config import RefineConfig, SensitivityConfig


def test_defaults_of_a_refinement() -> None:
    config = RefineConfig()
    assert config.train == "all" and config.norms
    assert RefineConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"learning_rate": -1e-3},
        {"learning_rate": math.inf},
        {"learning_rate": math.nan},
        {"train": "some"},
        {"validation_share": 0},
        {"validation_share": 0.51},
        {"rate": 1e-3},
    ],
)
def test_a_refinement_that_means_nothing_is_refused(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(ValidationError, match=name):
        RefineConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 1, "batch_size": 1},
        {"train": "free", "norms": False},
        {"validation_share": 0.5},
        {"learning_rate": 1.0},
    ],
)
def test_what_is_at_the_edge_is_taken(fields: dict[str, Any]) -> None:
    assert RefineConfig(**fields).model_dump(include=set(fields)) == fields


def test_defaults_of_a_sensitivity() -> None:
    config = SensitivityConfig()
    assert config.cache is None and config.damping > 0
    assert SensitivityConfig(**config.model_dump()) == config


def test_short_samples_are_measured_by_their_tokens() -> None:
    config = SensitivityConfig()
    assert config.count([1024] * 64) == config.count([512] * 64) == 32
    assert config.count([128] * 256) == 128
    assert config.count([50] * 256) >= 256  # all of them
    assert config.count([1024] * 8) == 32  # no more than asked for are there
    assert SensitivityConfig(samples=4).count([50] * 256) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"samples": 0},
        {"damping": 0},
        {"damping": math.inf},
        {"damping": math.nan},
        {"cache": 3},
        {"seed": 0},
    ],
)
def test_a_sensitivity_that_means_nothing_is_refused(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(ValidationError, match=name):
        SensitivityConfig(**fields)
