"""Removing units: smaller modules of the same kind, and a consumer with a corrected weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.structure.operators import as_matrix
from cur_modifier.structure.removal import Units, left_of, remove, smaller_norm

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


@pytest.mark.parametrize("affine", [True, False])
def test_a_smaller_batch_norm_does_to_its_features_what_it_did(affine: bool) -> None:
    norm = nn.BatchNorm2d(5, affine=affine).train()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm(torch.randn(8, 5, 3, 3) + torch.arange(5)[:, None, None])
    norm.eval().requires_grad_(False)
    kept = torch.tensor([0, 3])
    made = smaller_norm(norm, kept)
    x = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(made(x[:, kept]), norm(x)[:, kept])
    assert made.num_features == 2 and norm.num_features == 5 and not made.training
    assert made.num_batches_tracked == 1 and not any(p.requires_grad for p in made.parameters())


def test_which_slices_of_what_is_read_are_of_units() -> None:
    kept = torch.tensor([1, 2])
    units = Units("", "channels", {}, "c", torch.arange(12).view(3, 4))
    axis, left = left_of(units, kept, nn.Conv2d(3, 2, 2))
    assert (axis, left.tolist()) == (1, [1, 2])
    axis, left = left_of(units, kept, nn.Linear(12, 2))
    assert (axis, left.tolist()) == (-1, list(range(4, 12)))
