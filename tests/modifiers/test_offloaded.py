"""Models whose weights are brought to an accelerator only to be computed with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from compressed_tensors.offload import set_onload_device

from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import FORMS
from cur_modifier.modifiers.cur.candidates import Candidate
from cur_modifier.modifiers.report import parameter_bytes, parameter_count
from cur_modifier.passes.context import frozen


@pytest.fixture
def model(small_llama: Callable[..., nn.Module]) -> nn.Module:
    """Its weights lie on the CPU, and a look at one gives a copy on another device."""
    model = small_llama(0, tie_word_embeddings=True)
    set_onload_device(model, torch.device("meta"))
    assert model.lm_head.weight.device.type == "meta"
    return model


def test_tied_weights_count_once(model: nn.Module, small_llama: Callable[..., nn.Module]) -> None:
    plain = small_llama(0, tie_word_embeddings=True)
    assert parameter_bytes(model) == parameter_bytes(plain)
    assert parameter_count(model) == parameter_count(plain)


@pytest.mark.parametrize("form", FORMS)
def test_factors_lie_where_the_weights_do(model: nn.Module, form: str) -> None:
    linear = model.model.layers[0].self_attn.q_proj
    [factored] = (
        Candidate(members={"q": linear}, layer=0, rank=4).empty_modules(find_form(form)).values()
    )
    assert {p.device.type for p in factored.parameters()} == {"cpu"}


def test_the_parameters_themselves_are_frozen(model: nn.Module) -> None:
    from compressed_tensors.offload import disable_onloading

    with frozen(model), disable_onloading():
        assert not any(p.requires_grad for p in model.parameters())
    with disable_onloading():
        assert all(p.requires_grad for p in model.parameters())
