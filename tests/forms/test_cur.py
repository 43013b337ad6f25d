"""CUR layers know which rows and columns they are made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.forms.cur import FORM, CURLinear
from cur_modifier.linalg import cur


def test_bad_ranks_are_named() -> None:
    with pytest.raises(ValueError, match=r"rank 7 is outside 1..6 for a 8x6"):
        CURLinear(6, 8, 7)


def layer(m: int, n: int, rank: int, *, bias: bool = True) -> tuple[torch.Tensor, CURLinear]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=generator).double()
    rows, columns = (torch.randperm(side, generator=generator)[:rank] for side in (m, n))
    offset = torch.randn(m, generator=generator).double() if bias else None
    return W, CURLinear.from_factors(cur(W, rows, columns), offset)


def test_indices_say_which_rows_and_columns_are_stored() -> None:
    W, module = layer(8, 6, 3)
    assert torch.equal(module.cur_r.weight, W[module.rows.long()])
    assert torch.equal(module.cur_c.weight, W[:, module.columns.long()])


@given(st.integers(2, 9), st.integers(2, 9), st.data(), st.booleans())
def test_permutations_are_exact_and_the_indices_follow(
    m: int, n: int, data: st.DataObject, bias: bool
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    W, module = layer(m, n, rank, bias=bias)
    outputs = torch.tensor(data.draw(st.permutations(range(m))))
    inputs = torch.tensor(data.draw(st.permutations(range(n))))
    x = torch.randn(4, n, dtype=torch.float64)
    before = module(x)
    module.reorder_outputs(outputs)
    module.reorder_inputs(inputs)
    torch.testing.assert_close(module(x[:, inputs]), before[:, outputs])
    moved = W[outputs][:, inputs]
    assert torch.equal(module.cur_r.weight, moved[module.rows.long()])
    assert torch.equal(module.cur_c.weight, moved[:, module.columns.long()])


def test_one_order_of_outputs_is_as_good_as_another() -> None:
    _, module = layer(8, 6, 3)
    assert module.output_sequence is None and module.variant({module: "q"}) == {}


def test_the_core_alone_is_free() -> None:
    _, module = layer(8, 6, 3)
    assert module.factors[FORM.layer.free_factor].weight.shape == (3, 3)
