"""Linears of an empty model get the sizes that a checkpoint gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cur_modifier.forms.resize import is_matrix, resize, resize_norm, set_integers, size_of
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
        ("attention.norm", False, r"here it is a LayerNorm, and\s+only an nn\.Linear, a Conv1D or"),
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


def convolutions() -> Any:
    with torch.device("meta"):
        return nn.ModuleDict(
            {
                "conv": nn.Conv2d(3, 8, (3, 2), padding=1).half(),
                "groups": nn.Conv2d(4, 8, 3, groups=2),
                "norm": nn.BatchNorm2d(8),
                "plain": nn.BatchNorm2d(8, affine=False, track_running_stats=False),
            }
        )


def test_channels_of_a_convolution_change() -> None:
    model = convolutions()
    conv = model["conv"]
    assert is_matrix(conv) and not is_matrix(model["groups"])
    whole = DenseSize(out_features=8, in_features=3, kernel_size=(3, 2))
    assert size_of(conv) == whole and whole.weight_shape == (8, 3, 3, 2)
    resize(model, "conv", DenseSize(out_features=5, in_features=2, kernel_size=(3, 2)))
    assert conv.weight.shape == (5, 2, 3, 2) and conv.bias.shape == (5,)
    assert conv.weight.is_meta and conv.weight.dtype == torch.float16
    assert conv(torch.empty(1, 2, 6, 6, dtype=torch.float16, device="meta")).shape[1] == 5


@pytest.mark.parametrize(
    ("name", "kernel", "message"),
    [
        ("conv", None, r"kernel_size=None, but here it is a Conv2d with \(3, 2\)"),
        ("conv", (3, 3), r"kernel_size=\(3, 3\), but here"),
        ("groups", (3, 3), "here it is a Conv2d, and only an .* without groups"),
    ],
)
def test_another_kernel_is_refused(name: str, kernel: Any, message: str) -> None:
    size = DenseSize(out_features=5, in_features=2, kernel_size=kernel)
    with pytest.raises(SchemaError, match=message):
        resize(convolutions(), name, size)


def test_features_of_a_batch_norm_change() -> None:
    model = convolutions()
    for name in ("norm", "plain"):
        resize_norm(model, name, 5)
        module = model[name]
        assert module.num_features == 5
        sizes = {key: tuple(t.shape) for key, t in module.state_dict().items()}
        assert set(sizes.values()) <= {(5,), ()} and len(sizes) == (5 if name == "norm" else 0)
    with pytest.raises(
        SchemaError, match="conv is a batch norm of 5 features; here it is a Conv2d"
    ):
        resize_norm(model, "conv", 5)
