"""What a recipe's fields say together, and which of them contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llmcompressor")

from pydantic import ValidationError

from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import FORMS
from cur_modifier.linalg import Score, Selection
from cur_modifier.modifiers.cur.modifier import CURModifier


def test_defaults_are_those_of_curing() -> None:
    settings = CURModifier()
    assert settings.storage is find_form("cur") and settings.rank.max == 256
    assert settings.resolved_selection is Selection.DEIM
    assert settings.resolved_scores is Score.WANDA
    assert settings.layers.select == "angular" and settings.layers.resolved_count == 10
    assert settings.needs_survey and settings.needs_activations and not settings.needs_gradients


@pytest.mark.parametrize("form", FORMS)
def test_every_form_resolves(form: str) -> None:
    settings = CURModifier(form=form)
    default = settings.storage.default_selection
    assert settings.resolved_selection == default
    assert settings.resolved_scores == (Score.WANDA if default else None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "svd"}, r"no form 'svd'; choose cur, id"),
        ({"form": "low_rank", "selection": "deim"}, r"form 'low_rank' is made of none"),
        ({"form": "id", "scores": "wanda"}, r"scores 'wanda' guide a selection.*Give `selection`"),
        ({"form": "low_rank", "scores": "wanda"}, r"optimal approximation\. Drop `scores`"),
        ({"selection": "greedy", "scores": "gram"}, r"mean nothing to selection 'greedy'"),
        (
            {"layers": {"select": "sensitivity"}, "rank": {"energy": 0.9}},
            r"energy 0\.9 gives ranks after the layers are known",
        ),
        ({"share_skeleton": True}, r"share_skeleton is set with form 'cur'"),
        (
            {"share_skeleton": True, "form": "id", "selection": "qdeim"},
            r"share_skeleton is set with selection 'qdeim'",
        ),
        ({"anchor": 1.5}, "anchor"),
        ({"targets": []}, "targets"),
        ({"multiple_of": 0}, "multiple_of"),
    ],
)
def test_what_contradicts_itself_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CURModifier(**fields)


@pytest.mark.parametrize(
    ("fields", "unit"),
    [({}, 8), ({"rank": {"fixed": 5}}, 1), ({"rank": {"fixed": 6}, "multiple_of": 3}, 3)],
)
def test_ranks_come_in_units(fields: dict[str, Any], unit: int) -> None:
    assert CURModifier(**fields).rank_unit == unit


NO_DATA: dict[str, Any] = {"fit": "weight", "scores": "weight", "layers": {"select": "all"}}


@pytest.mark.parametrize(
    ("fields", "reasons", "gradients"),
    [
        ({}, [], False),
        ({"scores": "gram"}, ["scores 'gram'"], False),
        ({"fit": "diag"}, ["fit 'diag'"], False),
        ({"fit": "loss"}, ["fit 'loss'"], True),
        ({"layers": {"select": "angular"}}, ["layers selected by angular distance"], False),
        ({"layers": {"select": "sensitivity"}}, ["layers selected by sensitivity"], True),
        ({"rank": {"energy": 0.9}}, [], False),
        ({"rank": {"energy": 0.9}, "fit": "gram"}, ["fit 'gram'", "a rank by energy"], False),
        ({"anchor": 0.0}, ["anchor and refine"], False),
        ({"refine": {}}, ["anchor and refine"], True),
        ({"rank": {"ratio": 0.8, "budget": "sensitivity"}}, ["a budget by sensitivity"], True),
    ],
)
def test_reasons_for_data_are_named(
    fields: dict[str, Any], reasons: list[str], gradients: bool
) -> None:
    settings = CURModifier(**NO_DATA | fields)
    assert settings.data_reasons == reasons
    assert settings.needs_gradients is gradients
    assert settings.layerwise is ("anchor" in fields or "refine" in fields)


def test_a_dump_holds_plain_values() -> None:
    dumped = CURModifier(form="id", selection="qdeim", scores="diag", fit="loss").model_dump()
    assert [type(dumped[name]) for name in ("selection", "scores", "fit")] == [str] * 3
    assert CURModifier(**dumped).resolved_scores is Score.DIAG
