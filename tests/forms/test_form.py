"""What every form promises to whoever does not know which one it is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cur_modifier.forms.base import FactoredLinear
from cur_modifier.forms.form import Form
from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import FORMS, Shape
from cur_modifier.linalg import LowRank, Problem

ALL = [find_form(name) for name in FORMS]
EVERY_FORM = pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)


def weight(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).double()


@given(st.sampled_from(ALL), st.integers(2, 9), st.integers(1, 9), st.booleans(), st.data())
def test_a_solution_loads_into_a_built_layer(
    form: Form, m: int, n: int, bias: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, form.sizes.largest_rank(m, n)))
    W = weight(m, n)
    factors = form.solve(Problem(W=W, rank=rank))
    layer = form.build(Shape(m, n, rank), bias=bias, dtype=W.dtype)
    assert isinstance(layer, form.layer)
    form.load([layer], factors, [torch.ones(m).double() if bias else None])
    torch.testing.assert_close(layer.dense_weight(), factors.dense())
    assert layer.stored_parameters == sum(p.numel() for p in layer.parameters())
    shapes = form.sizes.tensors(Shape(m, n, rank), bias=bias)
    assert {name: tuple(t.shape) for name, t in layer.tensors().items()} == shapes


@EVERY_FORM
def test_full_rank_loses_nothing(form: Form) -> None:
    W = weight(6, 4)
    torch.testing.assert_close(form.solve(Problem(W=W, rank=4)).dense(), W)


@EVERY_FORM
def test_weights_that_are_solved_together_are_each_solved(form: Form) -> None:
    gram = torch.eye(6, dtype=torch.float64)
    problems = [
        Problem(W=weight(8, 6, seed), rank=rank, gram=gram) for seed, rank in ((0, 4), (1, 2))
    ]
    for problem, found in zip(problems, form.solve_together(problems), strict=True):
        assert found.rank == problem.rank and found.shape == (8, 6)
        torch.testing.assert_close(found.dense(), form.solve(problem).dense())
    [alone] = form.solve_together(problems[:1])
    assert torch.equal(alone.dense(), form.solve(problems[0]).dense())


@EVERY_FORM
def test_a_pair_is_held_exactly_or_refused(form: Form) -> None:
    pair = LowRank(A=weight(7, 3), B=weight(3, 5))
    if form.name == "cur":
        with pytest.raises(ValueError, match="form 'cur' can't hold any product of two factors"):
            form.of_pair(pair)
        return
    factors = form.of_pair(pair)
    torch.testing.assert_close(factors.dense(), pair.dense())
    layer = form.build(Shape(7, 5, 3), bias=False, dtype=torch.float64)
    form.load([layer], factors, [None])
    torch.testing.assert_close(layer.dense_weight(), pair.dense())


@EVERY_FORM
def test_layers_that_share_a_factor_are_the_stacked_weight(form: Form) -> None:
    def build() -> Sequence[FactoredLinear]:
        return form.build_shared(5, [4, 6], 3, [1, 2], bias=[False, True], dtype=torch.float64)

    if not form.sizes.shares_skeletons:
        with pytest.raises(ValueError, match=f"layers of form '{form.name}' share no factor"):
            build()
        return
    layers = build()
    assert [layer.leader for layer in layers] == [None, layers[0]]
    W = weight(10, 5)
    factors = form.solve(Problem(W=W, rank=3, blocks=[(4, 1), (6, 2)]))
    form.load(layers, factors, [None, torch.ones(6).double()])
    stacked = torch.cat([layer.dense_weight() for layer in layers])
    torch.testing.assert_close(stacked, factors.dense())
    assert layers[0].effective_bias() is None
    assert torch.equal(layers[1].effective_bias(), torch.ones(6).double())


@EVERY_FORM
def test_nothing_is_allocated_on_meta(form: Form) -> None:
    layer = form.build(Shape(8, 6, 3), bias=True, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


@EVERY_FORM
def test_what_a_form_says_of_itself_agrees(form: Form) -> None:
    assert form.layer.form == form.name
    layer = form.build(Shape(8, 6, 3), bias=False)
    assert form.layer.free_factor in layer.factors
    assert form.selects or form.default_selection is None
    # One order for several weights takes a form whose rows are free to choose.
    assert not form.orders_freely("qdeim")
    assert form.orders_freely(None) == (layer.output_sequence is not None)


def test_a_layer_loads_what_write_stores() -> None:
    """Offloaded modules store their tensors otherwise: nothing may go around ``write``."""
    written: list[str] = []

    def write(module: nn.Module, name: str, value: torch.Tensor) -> None:
        written.append(name)

    for form in ALL:
        layer = form.build(Shape(8, 6, 3), bias=True)
        written.clear()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        factors = form.solve(Problem(W=weight(8, 6), rank=3))
        form.load([layer], factors, [torch.ones(8)], write=write)
        assert len(written) == len(before)
        assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
