"""Fields of configs that say how many units there are: what they are said to build is built."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.passes.context import trial
from cur_modifier.structure.layers import decoder_layers
from cur_modifier.structure.removal import Kind, Units, remove
from cur_modifier.structure.search import find_units
from cur_modifier.structure.shapes import config_fields, config_with, shapes_with

from .models import built

COUNTS: dict[Kind, int] = {"heads": 1, "neurons": 16}
GROUPED = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SINGLE = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
MLP = {"intermediate_size": 16}
# Fields by kind; none where the class reads no field that does it.
FIELDS: dict[str, dict[Kind, dict[str, int]]] = {
    "Llama": {"heads": SINGLE, "neurons": MLP},
    "grouped Llama": {"heads": GROUPED, "neurons": MLP},
    "Llama with biases": {"heads": GROUPED, "neurons": MLP},
    "Qwen3": {"heads": GROUPED, "neurons": MLP},
    "Phi": {"heads": SINGLE, "neurons": MLP},
    "Phi3": {"neurons": MLP},
    "Gemma2": {"heads": GROUPED, "neurons": MLP},
    "OPT": {"heads": {}, "neurons": {"ffn_dim": 16}},
    "GPT2": {"heads": {}, "neurons": {"n_inner": 16}},
    "GPTNeoX": {"heads": {}, "neurons": MLP},
    "BERT": {"heads": {}, "neurons": MLP},
    "RoBERTa": {"heads": {}, "neurons": MLP},
    "Mixtral": {"heads": GROUPED},
    "OLMo2": {"neurons": MLP},
    "Bloom": {"neurons": {}},  # four times the hidden size
}
CASES = [(name, kind) for name, fields in FIELDS.items() for kind in fields]


@cache
def searched(name: str) -> tuple[Any, list[Units]]:
    """A model, which is not to be changed, and its units."""
    model = built(name)
    with trial(model) as run:
        layers = [name for name, _ in decoder_layers(model)]
        return model, find_units(model, layers, ["heads", "neurons"], run)


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def pruned(name: str, units: Sequence[Units], counts: dict[Kind, int]) -> Any:
    """The model with the first units of every layer."""
    model = copy.deepcopy(searched(name)[0])
    for each in units:
        remove(model, each, torch.arange(counts[each.kind]))
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(20).view(2, 10)).logits


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_fields_of_a_kind_are_found(name: str, kind: Kind) -> None:
    model, found = searched(name)
    units = [each for each in found if each.kind == kind]
    before = model.config.to_dict()
    assert config_fields(model, units, {kind: COUNTS[kind]}) == (FIELDS[name][kind] or None)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_both_kinds_go_together_or_not_at_all(name: str) -> None:
    model, found = searched(name)
    counts = {kind: COUNTS[kind] for kind in FIELDS[name]}
    wanted: dict[str, int] | None = None
    if all(FIELDS[name].values()):
        wanted = {key: value for fields in FIELDS[name].values() for key, value in fields.items()}
    assert config_fields(model, found, counts) == wanted


@pytest.mark.parametrize("name", [name for name, kinds in FIELDS.items() if all(kinds.values())])
def test_the_class_builds_the_pruned_model(name: str) -> None:
    original, found = searched(name)
    counts = {kind: COUNTS[kind] for kind in FIELDS[name]}
    model = pruned(name, found, counts)
    fields = config_fields(original, found, counts)
    assert fields
    fresh = type(model)(config_with(original.config, fields)).eval()
    assert shapes_of(fresh) == shapes_of(model)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh), logits(model))


@pytest.mark.parametrize("name", ["grouped Llama", "GPT2"])
def test_what_is_built_is_found_again(name: str) -> None:
    """So that a stage can remove more of what a stage has left."""
    original, found = searched(name)
    units = [each for each in found if each.kind == "neurons"]
    model = pruned(name, units, COUNTS)
    for field, value in (config_fields(original, units, {"neurons": 16}) or {}).items():
        setattr(model.config, field, value)
    with trial(model) as run:
        layers = [name for name, _ in decoder_layers(model)]
        again = find_units(model, layers, ["neurons"], run)
    assert [each.count for each in again] == [16, 16]
    [value] = (config_fields(model, again, {"neurons": 8}) or {}).values()
    assert value == 8


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_shapes_are_those_of_what_is_left(name: str, kind: Kind) -> None:
    """Of other counts in every layer, too."""
    original, found = searched(name)
    units = [each for each in found if each.kind == kind]
    counts = {each.consumer: 1 + k for k, each in enumerate(units)}
    model = copy.deepcopy(original)
    for each in units:
        remove(model, each, torch.arange(counts[each.consumer]))
    assert shapes_with(original, units, counts) == shapes_of(model)
    every = {each.consumer: each.count for each in units}
    assert shapes_with(original, units, every) == shapes_of(original)


def test_a_count_that_a_field_cannot_say_in_all_layers_has_none() -> None:
    """The other layers would be built smaller as well."""
    model, found = searched("grouped Llama")
    first = [each for each in found if each.layer.endswith(".0")]
    assert config_fields(model, first, {"neurons": 16}) is None


def test_what_stays_as_it_is_needs_no_field() -> None:
    model, found = searched("grouped Llama")
    assert config_fields(model, found[:0], {}) == {}
    assert config_fields(model, found, {each.kind: each.count for each in found}) == {}


def test_a_config_with_other_fields_is_a_copy() -> None:
    from transformers import LlamaConfig, LlavaConfig

    config = LlavaConfig(text_config=LlamaConfig(intermediate_size=48))
    changed = config_with(config, {"intermediate_size": 16})
    assert changed.text_config.intermediate_size == 16
    assert config.text_config.intermediate_size == 48
