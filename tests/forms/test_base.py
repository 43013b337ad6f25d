"""Factored layers compute the products that they claim to, whatever bias, dtype and batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.forms.base import FactoredLinear, Surroundings, answering_dense
from cur_modifier.forms.cur import CURLinear
from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.forms.sizes import Shape
from cur_modifier.linalg import cur, interpolative


def make(form: str, m: int, n: int, rank: int, bias: bool, dtype: torch.dtype) -> FactoredLinear:
    generator = torch.Generator().manual_seed(m * n + rank)
    W = torch.randn(m, n, generator=generator)
    offset = torch.randn(m, generator=generator) if bias else None
    if form == "cur":
        indices = torch.randperm(min(m, n), generator=generator)[:rank]
        return CURLinear.from_factors(cur(W, indices, indices), offset, dtype=dtype)
    return RowIDLinear.from_factors(interpolative(W, rank), offset, dtype=dtype)


@given(
    form=st.sampled_from(["cur", "id"]),
    m=st.integers(2, 12),
    n=st.integers(2, 12),
    rank=st.integers(1, 11),
    bias=st.booleans(),
    batch=st.sampled_from([(), (1,), (3,), (2, 5)]),
)
def test_forward_is_the_dense_product(
    form: str, m: int, n: int, rank: int, bias: bool, batch: tuple[int, ...]
) -> None:
    rank = min(rank, n, m - 1)
    layer = make(form, m, n, rank, bias, torch.float64)
    x = torch.randn(*batch, n, dtype=torch.float64)
    dense = layer.to_dense()
    assert dense.weight.shape == (m, n) and (dense.bias is not None) == bias
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["cur", "id"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_state_round_trip(form: str, dtype: torch.dtype) -> None:
    layer = make(form, 8, 6, 3, True, dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    other = type(layer)(6, 8, 3, bias=True, dtype=dtype)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6).to(dtype)
    assert torch.equal(layer(x), other(x))
    layer.to(torch.float32)
    index = layer.order if form == "id" else layer.rows
    assert index.dtype == torch.int32


@pytest.mark.parametrize("form", ["cur", "id"])
def test_meta_device_allocates_nothing(form: str) -> None:
    cls = CURLinear if form == "cur" else RowIDLinear
    layer = cls(6, 8, 3, bias=True, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())


@pytest.mark.parametrize("form", ["cur", "id"])
def test_the_stand_in_answers_until_the_factors_come(form: str) -> None:
    fitted = make(form, 8, 6, 3, True, torch.float32)
    dense = torch.nn.Linear(6, 8)
    layer = type(fitted)(6, 8, 3, bias=True)
    layer.stand_in(dense)
    x = torch.randn(2, 6)
    assert torch.equal(layer(x), dense(x))
    # Hidden from other stages, from the optimizer and from the checkpoint.
    assert dense not in list(layer.modules())
    assert layer.state_dict().keys() == fitted.state_dict().keys()
    W = dense.weight.detach()
    if form == "cur":
        layer.load_factors(cur(W, torch.arange(3), torch.arange(3)), dense.bias.detach())
    else:
        layer.load_factors(interpolative(W, 3), dense.bias.detach())
    assert layer.dense is None
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


@pytest.mark.parametrize("form", ["cur", "id"])
def test_the_dense_layer_can_stay_as_teacher(form: str) -> None:
    fitted = make(form, 8, 6, 3, True, torch.float32)
    dense = torch.nn.Linear(6, 8)
    layer = type(fitted)(6, 8, 3, bias=True)
    layer.stand_in(dense)
    layer.keep_dense()
    W, bias = dense.weight.detach(), dense.bias.detach()
    three = torch.arange(3)
    layer.load_factors(cur(W, three, three) if form == "cur" else interpolative(W, 3), bias)
    x = torch.randn(2, 6)
    assert layer.dense is None and layer.teacher is dense
    assert dense not in list(layer.modules())
    student = layer(x)
    with answering_dense(torch.nn.Sequential(layer, torch.nn.Identity())):
        assert torch.equal(layer(x), dense(x))
    assert torch.equal(layer(x), student) and not torch.equal(student, dense(x))
    layer.drop_teacher()
    with answering_dense(layer):
        assert torch.equal(layer(x), student)


def test_containers_are_not_linears_and_factors_are() -> None:
    for form in ("cur", "id"):
        layer = make(form, 8, 6, 3, True, torch.float32)
        assert not isinstance(layer, torch.nn.Linear)
        assert all(isinstance(f, torch.nn.Linear) for f in layer.factors.values())
        assert list(layer.factors) == list(layer.sizes.factors(Shape(8, 6, 3)))


def test_packed_factors_say_how_to_unpack_them() -> None:
    layer = make("cur", 8, 6, 3, False, torch.float32)
    del layer.cur_u.weight
    with pytest.raises(ValueError, match=r"'cur_u' holds packed weights.*forward pass"):
        layer.to_dense()


def positive(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    return x.T @ x / len(x)


def fitted(form: str) -> FactoredLinear:
    W = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    if form == "id":
        return RowIDLinear.from_factors(interpolative(W, 5))
    rows, columns = torch.tensor([0, 3, 7, 8]), torch.tensor([1, 2, 5, 8])
    return CURLinear.from_factors(cur(W, rows, columns))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("form", ["cur", "id"])
def test_a_change_of_a_factor_costs_what_its_metrics_say(form: str, diagonal: bool) -> None:
    module = fitted(form).double()
    G, H = positive(9, 1), positive(12, 2)
    H = torch.diag(H.diagonal()) if diagonal else H
    around = module.metrics(Surroundings(G, H.diagonal() if diagonal else H))
    before = module.dense_weight()
    assert set(around) == set(module.factors)
    for name, factor in module.factors.items():
        output, inputs = around[name]
        change = torch.randn(factor.weight.shape, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            factor.weight += change
            moved = module.dense_weight() - before
            factor.weight -= change
        cost = torch.einsum("ij,ik,kl,jl->", moved, H, moved, G)
        if output is None:
            # Left out where it would be a large diagonal: of the outputs that the factor makes.
            made = H.diagonal()[module.order >= module.rank] if form == "id" else H.diagonal()
            places = (
                module.order[module.order >= module.rank] - module.rank if form == "id" else None
            )
            output = torch.diag(made if places is None else made[torch.argsort(places)])
        predicted = torch.einsum("ij,ik,kl,jl->", change.double(), output, change.double(), inputs)
        torch.testing.assert_close(predicted, cost)
