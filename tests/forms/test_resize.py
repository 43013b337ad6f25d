"""Linears of an empty model get the sizes that a checkpoint gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cur_modifier.forms.resize import is_matrix, resize, set_integers, size_of
from cur_modifier.forms.schema import DenseSize, SchemaError


class Attention(nn.Module):
    """Two Linears, and what tells how many heads there are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8, bias=False)
        self.conv = Conv1D(8, 6)
        self.norm = nn.LayerNorm(6)
        self.heads = 4
        self.is_causal = True


@pytest.fixture
def model() -> Any:
    with torch.device("meta"):
        return nn.ModuleDict({"attention": Attention().to(torch.bfloat16)})


def test_which_modules_are_dense_linears(model: Any) -> None:
    found = {name for name, module in model.named_modules() if is_matrix(module)}
    assert found == {"attention.linear", "attention.conv"}


@pytest.mark.parametrize(
    ("name", "transposed", "stored"),
    [("attention.linear", False, (5, 3)), ("attention.conv", True, (3, 5))],
)
def test_sizes_change_and_the_rest_stays(
    model: Any, name: str, transposed: bool, stored: tuple[int, int]
) -> None:
    module = model.get_submodule(name)
    before = size_of(module)
    assert (before.out_features, before.in_features, before.transposed) == (8, 6, transposed)
    biased = module.bias is not None
    size = DenseSize(out_features=5, in_features=3, transposed=transposed)
    resize(model, name, size)
    assert size_of(module) == size and model.get_submodule(name) is module
    assert tuple(module.weight.shape) == stored == size.weight_shape
    assert module.weight.is_meta and module.weight.dtype == torch.bfloat16
    assert (module.bias is not None) == biased
    if biased:
        assert tuple(module.bias.shape) == (5,)
    x = torch.empty(2, 3, dtype=torch.bfloat16, device="meta")
    assert module(x).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "transposed", "message"),
    [
        ("attention.other", False, "ModuleDict has no such module"),
        ("attention.norm", False, r"here it is a LayerNorm, and\s+only an nn\.Linear or a Conv1D"),
        ("attention.linear", True, "transposed=True, but here it is a Linear"),
        ("attention.conv", False, "transposed=False, but here it is a Conv1D"),
    ],
)
def test_a_size_of_another_model_is_refused(
    model: Any, name: str, transposed: bool, message: str
) -> None:
    size = DenseSize(out_features=5, in_features=3, transposed=transposed)
    with pytest.raises(SchemaError, match=message):
        resize(model, name, size)


def test_integers_are_set(model: Any) -> None:
    set_integers(model, "attention", {"heads": 3})
    assert model.attention.heads == 3


@pytest.mark.parametrize(
    ("name", "attribute", "message"),
    [
        ("other", "heads", "other has heads, but ModuleDict has no such module"),
        ("attention", "tails", r"attention\.tails is 3, but a Attention has no integer"),
        ("attention", "is_causal", r"attention\.is_causal is 3, but"),
        ("attention", "linear", r"attention\.linear is 3, but"),
    ],
)
def test_nothing_but_integers_is_set(model: Any, name: str, attribute: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        set_integers(model, name, {attribute: 3})
