"""Decoder layers, in the order of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.structure.layers import decoder_layers


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
