"""A budget as a recipe gives it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.prune.config import BudgetConfig

MEASURES = ("ratio", "parameters", "macs")
INSIDE = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.sampled_from(MEASURES), INSIDE)
def test_one_measure_and_its_share(measure: str, share: float) -> None:
    budget = BudgetConfig(**{measure: share})
    assert budget.measure == measure and budget.share == share


@given(st.sampled_from(MEASURES), st.floats().filter(lambda x: not 0 < x < 1))
def test_a_share_that_is_none_is_refused(measure: str, share: float) -> None:
    with pytest.raises(ValidationError, match=r"is outside \(0, 1\): .*0\.8 keeps 80 %"):
        BudgetConfig(**{measure: share})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "budget has nothing set; give exactly one of ratio, parameters, macs"),
        ({"ratio": 0.5, "macs": 0.5}, r"budget has \['ratio', 'macs'\] set; give exactly one of"),
        (
            {"ratio": 0.5, "sequence_length": 64},
            "sequence_length 64 has no meaning with ratio: .*Leave it out, or give `macs`",
        ),
        ({"macs": 0.5, "sequence_length": 0}, "greater than or equal to 1"),
        ({"ratio": 0.5, "least": 1}, "less than 1"),
        ({"ratio": 0.5, "least": -0.1}, "greater than or equal to 0"),
        ({"ratio": 0.5, "by": "magnitude"}, "'sensitivity' or 'uniform'"),
        ({"ratio": 0.5, "share": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_a_budget_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BudgetConfig(**fields)


def test_a_length_goes_with_multiply_accumulates() -> None:
    assert BudgetConfig(macs=0.5, sequence_length=384).sequence_length == 384
    assert BudgetConfig(macs=0.5).sequence_length > 0


def test_by_default_little_is_left_of_a_layer_where_the_budget_is_small() -> None:
    assert BudgetConfig(macs=0.8).floor == 0.3
    assert BudgetConfig(macs=0.2).floor == pytest.approx(0.04)
    assert BudgetConfig(macs=0.2, least=0.15).floor == 0.15
