"""What a recipe's fields say together, and which of them contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llmcompressor")

from pydantic import ValidationError

from cur_modifier.linalg import Selection
from cur_modifier.modifiers.prune.modifier import IDPruningModifier

OF_BLOCKS = ("elimination", "norm", "leverage", "random")

WEIGHT: dict[str, Any] = {
    "fit": "weight",
    "selection": "norm",
    "correct": "none",
    "budget": {"ratio": 0.5, "by": "uniform"},
}


def test_defaults_remove_neurons_alike_in_all_layers() -> None:
    settings = IDPruningModifier()
    assert settings.units == ["neurons"] and settings.shapes == "uniform"
    assert (settings.budget.measure, settings.budget.share) == ("ratio", 0.8)
    assert settings.selection is Selection.ELIMINATION and settings.correct == "layers"
    assert settings.needs_gradients


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"units": []}, "at least 1 item"),
        ({"units": ["filters"]}, "'neurons', 'heads' or 'channels'"),
        ({"units": ["heads", "heads"]}, r"units \['heads', 'heads'\] names a kind twice; name"),
        ({"targets": []}, "at least 1 item"),
        ({"budget": {}}, "budget has nothing set"),
        ({"shapes": "alike"}, "'uniform' or 'free'"),
        ({"selection": "svd"}, "selection"),
        ({"max_entry": 1}, "greater than 1"),
        ({"max_entry": float("inf")}, "finite"),
        ({"fit": "diag"}, "'loss', 'gram' or 'weight'"),
        (
            {"fit": "weight"},
            r"fit 'weight'.*looks at no data, which selection 'elimination', correct 'layers', a "
            r"budget by sensitivity need\. Write `selection: norm`",
        ),
        (
            WEIGHT | {"refine": {}},
            r"looks at no data, which refine need.*or another fit",
        ),
        ({"anchor": 1.5}, "less than or equal to 1"),
        ({"multiple_of": 0}, "greater than or equal to 1"),
        (
            {"units": ["heads"], "max_entry": 2},
            r"max_entry 2\.0 bounds the interpolation of single features.*Leave it out",
        ),
        ({"units": ["channels"]}, r"shapes 'uniform' with channels.*Write `shapes: free`"),
        (
            {"units": ["channels", "heads"], "shapes": "free"},
            r"heads are looked for in decoder layers.*Write a stage for each",
        ),
        (
            {"units": ["channels"], "shapes": "free", "selection": "qdeim"},
            r"selection 'qdeim' chooses single features, and a channel has several",
        ),
        (
            {"units": ["channels"], "shapes": "free", "refine": {}},
            r"refine with channels: it trains Linears.*`correct: layers`",
        ),
        (
            {
                "units": ["channels"],
                "shapes": "free",
                "budget": {"macs": 0.5, "sequence_length": 9},
            },
            r"sequence_length 9 with channels.*Leave it out",
        ),
        (
            {"correct": "none", "anchor": 0.5},
            r"anchor 0\.5 is the dense model's share.*`correct: none` fits none\. Leave one",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        IDPruningModifier(**fields)


@pytest.mark.parametrize("kind", Selection)
def test_heads_take_the_selections_of_several_features(kind: Selection) -> None:
    IDPruningModifier(units=["neurons"], selection=kind)
    if kind in OF_BLOCKS:
        IDPruningModifier(units=["neurons", "heads"], selection=kind)
        return
    with pytest.raises(ValidationError, match=rf"selection '{kind}' chooses single features") as e:
        IDPruningModifier(units=["neurons", "heads"], selection=kind)
    assert ", ".join(OF_BLOCKS) in str(e.value) and "`units: [neurons]`" in str(e.value)


def test_weights_alone_need_no_data() -> None:
    settings = IDPruningModifier(**WEIGHT)
    assert not settings.needs_data and not settings.needs_gradients
    assert IDPruningModifier(fit="gram").needs_data
    IDPruningModifier(**WEIGHT | {"selection": "random"})


def test_without_correction_nothing_is_anchored_by_default() -> None:
    IDPruningModifier(correct="none")
    IDPruningModifier(correct="none", anchor=None)


@pytest.mark.parametrize(
    ("fields", "gradients"),
    [
        ({}, False),
        ({"fit": "loss"}, True),
        ({"budget": {"ratio": 0.5}}, True),  # by sensitivity
        ({"refine": {}}, True),
    ],
)
def test_gradients_are_measured_where_they_decide(fields: dict[str, Any], gradients: bool) -> None:
    plain: dict[str, Any] = {"fit": "gram", "budget": {"ratio": 0.5, "by": "uniform"}}
    assert IDPruningModifier(**plain | fields).needs_gradients is gradients


def test_a_dump_holds_plain_values_and_is_taken_again() -> None:
    """llm-compressor writes all fields beside the checkpoint, those by default too."""
    for fields in ({}, {"selection": "norm", "refine": {}}, {"correct": "none"}, WEIGHT):
        dumped = IDPruningModifier(**fields).model_dump()
        assert type(dumped["selection"]) is str
        assert IDPruningModifier(**dumped).model_dump() == dumped
