"""Rows of convolutions: what is multiplied by the matrix is what the module answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.structure.operators import matrix_of
from cur_modifier.structure.patches import count_positions, rows_answered, rows_read

from .vision import Chain, images, settled

convolutions = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "stride": st.integers(1, 2),
        "dilation": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "bias": st.booleans(),
        "padding_mode": st.sampled_from(["zeros", "reflect", "circular"]),
    }
)


@given(convolutions, st.integers(1, 3), st.integers(1, 4))
def test_patches_times_the_matrix_are_the_answer(
    fields: dict[str, Any], channels: int, outputs: int
) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(channels, outputs, **fields).double()
    x = torch.randn(2, channels, 7, 6).double()
    rows = torch.cat([part for (part,) in rows_read(module, x, seed=0)])
    answered = rows @ matrix_of(module).T
    if module.bias is not None:
        answered = answered + module.bias
    torch.testing.assert_close(answered, rows_answered(module, module(x)).flatten(0, 2))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_its_name(padding: str) -> None:
    module = nn.Conv2d(2, 3, 3, padding=padding)
    x = images(2, channels=2)
    rows = torch.cat([part for (part,) in rows_read(module, x, seed=0)])
    wanted = rows_answered(module, module(x)).flatten(0, 2)
    torch.testing.assert_close(rows @ matrix_of(module).T + module.bias, wanted)


def test_many_positions_are_sampled_alike_for_all_inputs_and_by_seed() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1)
    x = images(2, channels=2)

    def read(seed: int) -> list[tuple[torch.Tensor, ...]]:
        return list(rows_read(module, x, 2 * x, seed=seed, most=10))

    first, again, other = read(3), read(3), read(4)
    assert len(first) == 2 and all(one.shape == (10, 18) for one, _ in first)
    for one, two in first:
        assert torch.equal(2 * one, two) and len(one.unique(dim=0)) == 10
    for pair, same in zip(first, again, strict=True):
        assert torch.equal(pair[0], same[0]) and torch.equal(pair[1], same[1])
    assert not torch.equal(first[0][0], other[0][0])
    everything = {tuple(row.tolist()) for (part,) in rows_read(module, x, seed=0) for row in part}
    assert all(tuple(row.tolist()) in everything for row in first[1][0])


def test_a_linear_reads_its_input_itself() -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    [(one, other)] = rows_read(nn.Linear(4, 2), x, y, seed=0)
    assert one is x and other is y
    assert rows_answered(nn.Linear(4, 2), x) is x


def test_positions_are_counted() -> None:
    model = settled(Chain())
    model.unused = nn.Linear(2, 2)
    found = count_positions(model, lambda: model(images(1)))
    assert found == {"features.0": 64, "features.3": 64, "features.7": 16, "classifier": 1}
