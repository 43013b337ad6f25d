"""Neurons are found by trying, and put in order without changing what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.forms.cur import CURLinear
from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.linalg import cur, interpolative, interpolative_aligned
from cur_modifier.structure.neurons import Neurons, find_neurons, put_in_order

LAYER = "model.layers.0"
GATE, UP, DOWN = (f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down"))
MLP = Neurons(LAYER, (GATE, UP), DOWN)
IDS = torch.arange(10)[None]


@pytest.fixture
def model(small_llama: Callable[..., Any]) -> Any:
    return small_llama(0, num_hidden_layers=2)


def run(model: Any) -> Callable[[], None]:
    return lambda: model(IDS, use_cache=False)


@torch.no_grad()
def found(model: Any, wanted: set[str]) -> list[Neurons]:
    return find_neurons(model, [LAYER], wanted, run(model))


@torch.no_grad()
def moved(model: Any, neurons: list[Neurons]) -> int:
    return put_in_order(model, neurons, run(model))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def factor(model: Any, *, aligned: bool = True) -> list[RowIDLinear]:
    """Row IDs in the places of gate and up."""
    weights = [model.get_submodule(name).weight.detach() for name in (GATE, UP)]
    ids = interpolative_aligned(weights, [8, 6])
    if not aligned:
        ids = [interpolative(W, 6, rows=torch.arange(k, k + 6)) for k, W in enumerate(weights)]
    layers = [RowIDLinear.from_factors(each) for each in ids]
    for name, layer in zip((GATE, UP), layers, strict=True):
        model.set_submodule(name, layer)
    return layers


def test_an_mlp_has_neurons_and_attention_has_none(model: Any) -> None:
    assert found(model, {UP}) == [MLP]
    assert found(model, {f"{LAYER}.self_attn.{n}_proj" for n in "qkvo"}) == []
    assert find_neurons(model, [], {UP}, run(model)) == []


def test_only_producers_that_are_wanted_are_tried(model: Any) -> None:
    assert found(model, {DOWN}) == [] and found(model, {GATE, DOWN}) == [MLP]


def test_a_function_that_mixes_neurons_leaves_none(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.LayerNorm(24)  # its weights are not all alike
    nn.init.normal_(model.model.layers[0].mlp.act_fn.weight)
    assert found(model, {UP}) == []


def test_modules_of_an_earlier_quantization_are_left_alone(model: Any) -> None:
    model.get_submodule(UP).quantization_scheme = object()
    assert found(model, {UP}) == []


@pytest.mark.parametrize("bias", [False, True])
def test_order_costs_nothing_and_is_straight_afterwards(
    small_llama: Callable[..., Any], bias: bool
) -> None:
    model = small_llama(0, num_hidden_layers=2, mlp_bias=bias)
    layers = factor(model)
    before = logits(model)
    assert moved(model, [MLP]) == 1
    torch.testing.assert_close(logits(model), before)
    for layer in layers:
        assert torch.equal(layer.order, torch.arange(24, dtype=torch.int32))
    assert moved(model, [MLP]) == 0  # they stand in order already


def test_what_was_kept_to_learn_from_follows(model: Any) -> None:
    dense = {name: model.get_submodule(name) for name in (GATE, UP)}
    layers = factor(model)
    for name, layer in zip((GATE, UP), layers, strict=True):
        layer.stand_in(dense[name])
        layer.keep_dense()
        layer._stand_in = []
    before = dense[UP].weight.detach().clone()
    sequence = layers[1].output_sequence
    assert moved(model, [MLP]) == 1
    assert torch.equal(layers[1].teacher.weight, before[sequence])


def test_layers_that_disagree_about_the_order_stay_as_they_are(model: Any) -> None:
    factor(model, aligned=False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert moved(model, [MLP]) == 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_forms_without_an_order_of_their_own_ask_for_none(model: Any) -> None:
    for name in (GATE, UP):
        W = model.get_submodule(name).weight.detach()
        model.set_submodule(name, CURLinear.from_factors(cur(W, torch.arange(4), torch.arange(4))))
    assert moved(model, [MLP]) == 0


def test_a_dense_producer_beside_a_factored_one_follows_it(model: Any) -> None:
    dense = model.get_submodule(UP)
    factor(model)
    model.set_submodule(UP, dense)
    before, weight = logits(model), dense.weight.detach().clone()
    assert moved(model, [MLP]) == 1
    torch.testing.assert_close(logits(model), before)
    assert isinstance(dense, nn.Linear) and not torch.equal(dense.weight, weight)
