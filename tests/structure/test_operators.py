"""Modules as matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

pytest.importorskip("llmcompressor")

from cur_modifier.structure.operators import as_matrix


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


def test_it_is_a_view() -> None:
    module = Conv1D(3, 5)
    matrix = as_matrix(module)
    assert matrix is not None and matrix.data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize("module", [nn.Conv2d(4, 4, 2, groups=2), nn.LayerNorm(4), nn.ReLU()])
def test_others_are_none(module: nn.Module) -> None:
    assert as_matrix(module) is None
