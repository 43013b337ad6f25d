"""Decoder layers, in the order of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.structure.layers import below, convolution_blocks, decoder_layers

from .vision import Chain, resnet


def test_layers_come_by_name_and_in_order(small_llama: Callable[..., Any]) -> None:
    model = small_llama(0, num_hidden_layers=12)
    found = decoder_layers(model)
    assert [name for name, _ in found] == [f"model.layers.{index}" for index in range(12)]
    assert all(module is model.get_submodule(name) for name, module in found)


def test_a_model_that_names_no_layers_is_refused(small_llama: Callable[..., Any]) -> None:
    model = small_llama(0, num_hidden_layers=1)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM names no layers.*supported"):
        decoder_layers(model)


def test_residual_blocks_are_the_layers_of_a_residual_network() -> None:
    model = resnet()
    found = convolution_blocks(model)
    assert [name for name, _ in found] == [
        f"resnet.encoder.stages.{stage}.layers.{block}" for stage in (0, 1) for block in (0, 1)
    ]
    assert all(module is model.get_submodule(name) for name, module in found)


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_chain_is_one_layer(in_parts: bool) -> None:
    model = Chain()
    if in_parts:  # of one class, but each a chain
        parts = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)) for _ in "ab"]
        model.features = nn.Sequential(*parts)
    assert convolution_blocks(model) == [("", model)]


def test_names_inside_a_layer() -> None:
    assert below("a.b") == "a.b." and below("") == ""
