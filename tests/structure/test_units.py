"""What a layer answers when units of it are permuted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import Shape
from cur_modifier.structure.readers import called_once, recorded
from cur_modifier.structure.units import is_quantized, linears_below, unchanged_by


class Layer(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), norm, nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.norm(self.up(x).relu()))


def unchanged(norm: nn.Module, order: torch.Tensor, back: torch.Tensor) -> bool:
    model = nn.ModuleDict({"layer": Layer(norm)})
    with torch.no_grad():
        with recorded(model, ["layer", "layer.up", "layer.down"]) as calls:
            model["layer"](torch.randn(3, 4))
        orders = {"layer.up": order}
        consumer = ("layer.down", back)
        return unchanged_by(model, "layer", orders, consumer, called_once(calls))


def test_neurons_may_be_permuted_and_only_as_they_are_permuted_back() -> None:
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    assert unchanged(nn.Identity(), order, order)
    assert not unchanged(nn.Identity(), order, order.argsort())


def test_what_tells_neurons_apart_is_seen() -> None:
    norm = nn.LayerNorm(6)
    nn.init.uniform_(norm.weight)
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    assert not unchanged(norm, order, order)
    assert unchanged(norm, torch.arange(6), torch.arange(6))


def test_a_layer_that_was_not_called_says_nothing() -> None:
    model = nn.ModuleDict({"layer": Layer(nn.Identity())})
    order = torch.arange(6)
    assert not unchanged_by(model, "layer", {"layer.up": order}, ("layer.down", order), {})


def test_factors_are_no_linears_of_the_layer() -> None:
    model = nn.ModuleDict({"layer": Layer(nn.Identity())})
    model["layer"].up = find_form("cur").build(Shape(6, 4, 2), bias=True, device="cpu")
    assert list(linears_below(model, ["layer"])) == ["layer.up", "layer.down"]
    assert not is_quantized(model["layer"].down)
