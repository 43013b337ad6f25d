"""Layers made of a plain pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.forms.base import Surroundings
from cur_modifier.forms.low_rank import FORM, LowRankLinear
from cur_modifier.forms.sizes import Shape
from cur_modifier.linalg import LowRank


def layer(m: int, n: int, rank: int, *, bias: bool = True) -> LowRankLinear:
    generator = torch.Generator().manual_seed(m * n + rank)
    A, B, b = (torch.randn(*s, generator=generator) for s in ((m, rank), (rank, n), (m,)))
    pair = LowRank(A=A.double(), B=B.double())
    return LowRankLinear.from_factors(pair, b.double() if bias else None)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_forward_is_the_dense_product(m: int, n: int, rank: int, bias: bool) -> None:
    module = layer(m, n, min(rank, m, n), bias=bias)
    x = torch.randn(2, 3, n, dtype=torch.float64)
    torch.testing.assert_close(module(x), module.to_dense()(x))
    assert module.stored_parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_change_of_a_factor_costs_what_its_metrics_say(diagonal: bool) -> None:
    module = layer(7, 5, 3)
    x, y = torch.randn(20, 5).double(), torch.randn(20, 7).double()
    G, H = x.T @ x, y.T @ y
    H = H.diagonal() if diagonal else H
    around = module.metrics(Surroundings(G, H))
    assert list(around) == ["lr_b", "lr_a"]
    before = module.dense_weight()
    for name, factor in module.factors.items():
        output, inputs = around[name]
        output = torch.diag(H) if output is None else output
        change = torch.randn_like(factor.weight)
        with torch.no_grad():
            factor.weight += change
            moved = module.dense_weight() - before
            factor.weight -= change
        whole = torch.diag(H) if diagonal else H
        cost = torch.trace(moved.T @ whole @ moved @ G)
        torch.testing.assert_close(torch.trace(change.T @ output @ change @ inputs), cost)


def test_permutations_are_exact() -> None:
    module, reference = layer(7, 5, 3), layer(7, 5, 3)
    outputs, inputs = torch.randperm(7), torch.randperm(5)
    module.reorder_outputs(outputs)
    module.reorder_inputs(inputs)
    x = torch.randn(4, 5).double()
    torch.testing.assert_close(module(x[:, inputs]), reference(x)[:, outputs])
    assert module.output_sequence is None


def test_a_rank_that_it_cannot_have_is_named() -> None:
    with pytest.raises(ValueError, match=r"rank 6 is outside 1..5 for a 7x5"):
        FORM.build(Shape(7, 5, 6), bias=False)


def test_it_shares_nothing() -> None:
    with pytest.raises(ValueError, match="'low_rank' share no factor"):
        FORM.build_shared(5, [4, 4], 2, [1, 1], bias=[False, False])
