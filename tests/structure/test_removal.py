"""Removing units: smaller modules of the same kind, and a consumer with a corrected weight."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.structure.operators import as_matrix
from cur_modifier.structure.removal import Units, remove

from .models import built
from .test_search import found_in, logits, searched, some


def test_what_is_removed_keeps_its_dtype() -> None:
    model = built("GPT2", torch.bfloat16)
    for units in found_in(model):
        remove(model, units, some(units))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize("name", ["Llama with biases", "GPT2"])
def test_a_consumer_takes_the_corrected_weight_and_bias(name: str) -> None:
    model = copy.deepcopy(searched(name)[0])
    for units in searched(name)[1]:
        kept = some(units)
        consumer = model.get_submodule(units.consumer)
        generator = torch.Generator().manual_seed(0)
        outputs = len(as_matrix(consumer))
        weight = torch.randn(outputs, kept.numel() * units.reads.shape[1], generator=generator)
        bias = torch.randn(outputs, generator=generator)
        own = None if consumer.bias is None else consumer.bias.detach().clone()
        remove(model, units, kept, weight)
        made = model.get_submodule(units.consumer)
        assert torch.equal(as_matrix(made), weight)
        assert made.bias is None if own is None else torch.equal(made.bias, own)
    for units in searched(name)[1]:
        again = model.get_submodule(units.consumer)
        every = Units(units.layer, units.kind, {}, units.consumer, units.reads)
        remove(model, every, torch.arange(units.count), as_matrix(again).double(), bias.double())
        assert torch.equal(model.get_submodule(units.consumer).bias, bias)
        assert model.get_submodule(units.consumer).weight.dtype == torch.float32
