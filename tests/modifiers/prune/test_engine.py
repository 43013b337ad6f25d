"""Removal layer by layer: what is kept, and what correcting is worth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.prune.engine import remove_units
from cur_modifier.modifiers.prune.journal import PruningJournal
from cur_modifier.modifiers.prune.plan import check, make_plan

from .stages import LAYERS, stage


def missed(dense: Any, model: Any, batches: Any) -> float:
    """Squared distance of the last hidden states, over that of the dense ones."""
    with torch.no_grad():
        pairs = [
            (dense.model(**b).last_hidden_state, model.model(**b).last_hidden_state)
            for b in batches
        ]
    return float(
        sum((one - other).square().sum() for one, other in pairs)
        / sum(one.square().sum() for one, _ in pairs)
    )


@pytest.fixture
def removed(
    model: Any, batches: Any, recipe: Callable[..., Any]
) -> Callable[..., tuple[Any, PruningJournal]]:
    def run(**fields: Any) -> tuple[Any, PruningJournal]:
        own = copy.deepcopy(model)
        settings = recipe(stage(shapes="free", **fields))
        journal = PruningJournal(own, enabled=False)
        plan = make_plan(check(settings, own, batches), own, batches)
        remove_units(own, plan, batches, journal)
        return own, journal

    return run


def test_sizes_and_records_agree(removed: Any) -> None:
    model, journal = removed()
    for record in journal.records.values():
        mlp = model.get_submodule(record.name.removesuffix(".down_proj"))
        assert mlp.down_proj.in_features == record.after == mlp.gate_proj.out_features
        assert record.before == 24 and record.after % 4 == 0
        if record.after < record.before:
            assert 0 <= record.relative_error < 1 and record.tokens == 4 * 2 * 12
        else:
            assert record.relative_error is None and record.seconds is None
    assert sorted(r.layer for r in journal.records.values()) == list(range(LAYERS))


def test_correcting_pays_on_the_calibration_itself(model: Any, batches: Any, removed: Any) -> None:
    distances = {
        how: missed(model, removed(correct=how, anchor=anchor)[0], batches)
        for how, anchor in (("none", None), ("consumers", 1.0), ("layers", 1.0))
    }
    assert distances["consumers"] < distances["none"]
    assert distances["layers"] < distances["consumers"]


def test_without_correction_rows_and_columns_are_the_dense_model_s(
    model: Any, removed: Any
) -> None:
    pruned, _ = removed(correct="none", anchor=None)
    for before, after in zip(model.model.layers, pruned.model.layers, strict=True):
        columns = before.mlp.down_proj.weight.T
        for column in after.mlp.down_proj.weight.T:
            assert any(torch.equal(column, each) for each in columns)
        assert torch.equal(before.self_attn.o_proj.weight, after.self_attn.o_proj.weight)


def test_refining_helps_on_held_out_windows(removed: Any) -> None:
    _, journal = removed(refine={"epochs": 2, "batch_size": 2})
    assert journal._refined and all(r.after <= r.before for r in journal._refined)


def test_heads_and_neurons_of_one_layer_go_one_after_the_other(
    model: Any, batches: Any, removed: Any
) -> None:
    pruned, journal = removed(units=["neurons", "heads"], served=False, budget={"ratio": 0.6})
    kinds = {record.kind for record in journal.records.values()}
    assert kinds == {"neurons", "heads"}
    for layer in pruned.model.layers:
        attention = layer.self_attn
        assert attention.q_proj.out_features == attention.o_proj.in_features
    assert missed(model, pruned, batches) < 1


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_channels_go_and_correcting_pays(
    small_resnet: Any, images: Any, recipe: Callable[..., Any], layer_type: str
) -> None:
    dense = small_resnet(0, layer_type=layer_type, hidden_sizes=[32, 64])
    missed = {}
    for how, anchor in (("none", None), ("consumers", None), ("layers", 1.0)):
        own = copy.deepcopy(dense)
        fields = {"shapes": "free", "budget": {"macs": 0.6}, "correct": how, "anchor": anchor}
        settings = recipe(stage(units=["channels"], multiple_of=1, fit="gram", **fields))
        journal = PruningJournal(own, enabled=False)
        plan = make_plan(check(settings, own, images), own, images)
        remove_units(own, plan, images, journal)
        for record in journal.records.values():
            consumer = own.get_submodule(record.name)
            assert consumer.in_channels == record.after
        with torch.no_grad():
            pairs = [(dense(**b).logits, own(**b).logits) for b in images]
        missed[how] = float(sum((a - b).square().sum() for a, b in pairs))
    assert missed["layers"] < missed["consumers"] < missed["none"]
