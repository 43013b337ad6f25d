"""Modules as matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

pytest.importorskip("llmcompressor")

from cur_modifier.structure.operators import as_matrix, is_convolution, smaller


@pytest.mark.parametrize("module", [nn.Linear(5, 3), Conv1D(3, 5)])
def test_the_matrix_is_what_multiplies(module: nn.Module) -> None:
    matrix = as_matrix(module)
    assert matrix is not None and matrix.shape == (3, 5)
    x = torch.randn(2, 5)
    torch.testing.assert_close(x @ matrix.T + module.bias, module(x))


def test_a_convolution_multiplies_patches() -> None:
    module = nn.Conv2d(3, 4, kernel_size=2)
    matrix = as_matrix(module)
    assert matrix is not None and matrix.shape == (4, 12)
    x = torch.randn(1, 3, 5, 5)
    patches = nn.functional.unfold(x, 2)
    torch.testing.assert_close(
        (matrix @ patches).view(1, 4, 4, 4) + module.bias[:, None, None], module(x)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": 2, "bias": False},
        {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "reflect"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_smaller_convolution_has_fewer_channels(
    fields: dict[str, Any], dtype: torch.dtype
) -> None:
    module = nn.Conv2d(3, 5, **fields).to(dtype).requires_grad_(False)
    matrix = as_matrix(module)
    assert matrix is not None
    places = module.weight[0, 0].numel()
    bias = None if module.bias is None else module.bias[:2]
    made = smaller(module, matrix[:2, : 2 * places], bias)
    x = torch.randn(2, 3, 9, 8, dtype=dtype)
    x[:, 2] = 0
    torch.testing.assert_close(made(x[:, :2]), module(x)[:, :2])
    assert is_convolution(made) and (made.out_channels, made.in_channels) == (2, 2)
    assert not made.weight.requires_grad and made.weight.dtype == dtype


def test_which_modules_are_convolutions_of_images() -> None:
    assert is_convolution(nn.Conv2d(4, 4, 2))
    for other in (nn.Conv2d(4, 4, 2, groups=2), nn.Conv1d(4, 4, 2), nn.Linear(4, 4), None):
        assert not is_convolution(other)


def test_it_is_a_view() -> None:
    module = Conv1D(3, 5)
    matrix = as_matrix(module)
    assert matrix is not None and matrix.data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize("module", [nn.Conv2d(4, 4, 2, groups=2), nn.LayerNorm(4), nn.ReLU()])
def test_others_are_none(module: nn.Module) -> None:
    assert as_matrix(module) is None


KINDS = {
    "Linear": lambda: nn.Linear(5, 3),
    "Linear without bias": lambda: nn.Linear(5, 3, bias=False),
    "Conv1D": lambda: Conv1D(3, 5),
}


def shrunk_to(module: nn.Module, m: int, n: int) -> nn.Module:
    """A smaller one with the first rows and columns of the old one's matrix."""
    matrix = as_matrix(module)
    assert matrix is not None
    bias = module.bias
    return smaller(module, matrix[:m, :n], None if bias is None else bias[:m])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), [(2, 5), (3, 4), (1, 1), (3, 5)])
def test_a_smaller_module_multiplies_by_the_smaller_matrix(kind: str, m: int, n: int) -> None:
    module = KINDS[kind]()
    if module.bias is not None:
        nn.init.normal_(module.bias)
    made = shrunk_to(module, m, n)
    assert type(made) is type(module)
    assert (made.bias is None) is (module.bias is None)
    x = torch.randn(2, 5)
    x[:, n:] = 0
    torch.testing.assert_close(made(x[:, :n]), module(x)[:, :m])
    sizes = (
        (made.nf, made.nx) if isinstance(made, Conv1D) else (made.out_features, made.in_features)
    )
    assert sizes == (m, n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("trained", [True, False])
def test_a_smaller_module_is_as_the_old_one_else(
    kind: str, dtype: torch.dtype, trained: bool
) -> None:
    module = KINDS[kind]().to(dtype).train(trained).requires_grad_(trained)
    matrix = as_matrix(module)
    assert matrix is not None
    bias = None if module.bias is None else module.bias[:2].double()
    made = smaller(module, matrix[:2].double(), bias)
    assert made.training is trained
    for parameter in made.parameters():
        assert parameter.dtype == dtype and parameter.requires_grad is trained
        assert parameter.is_contiguous() and parameter.is_leaf
    assert len(list(made.parameters())) == len(list(module.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_module_shares_nothing_with_the_old_one(kind: str) -> None:
    module = KINDS[kind]()
    made = shrunk_to(module, 3, 5)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_linear_can_get_a_bias() -> None:
    module = nn.Linear(5, 3, bias=False)
    made = smaller(module, module.weight, torch.arange(3.0))
    torch.testing.assert_close(made(torch.zeros(1, 5)), torch.arange(3.0)[None])
