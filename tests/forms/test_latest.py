"""A shared product is computed once, and never from what is no longer true."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cur_modifier.forms.row_id import RowIDLinear, load_shared
from cur_modifier.linalg import RowID

from .shared import INPUTS, RANK, SIZES, Attention, make


@pytest.fixture
def attention() -> Attention:
    return Attention(make(SIZES, INPUTS, RANK, bias=True))


def counted(layer: RowIDLinear) -> list[int]:
    """One entry for every time that the skeleton is applied."""
    calls: list[int] = []
    layer.id_s.register_forward_hook(lambda *_: calls.append(1))
    return calls


def expected(model: Attention, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer.to_dense()(x) for layer in model.children()], -1)  # type: ignore[operator]


def test_once_for_each_forward_pass(attention: Attention) -> None:
    calls = counted(attention.q)
    x = torch.randn(4, INPUTS)
    with torch.no_grad():
        for passes in (1, 2, 3):  # of the same tensor, too
            torch.testing.assert_close(attention(x), expected(attention, x))
            assert len(calls) == passes
    assert attention.q._latest._z is None


@pytest.mark.parametrize("first", ["q", "k", "v"])
def test_any_layer_may_be_called_first_or_never(attention: Attention, first: str) -> None:
    calls = counted(attention.q)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, INPUTS)
            layer = attention.get_submodule(first)
            torch.testing.assert_close(layer(x), layer.to_dense()(x))  # type: ignore[operator]
    assert len(calls) == 3


def test_nothing_outlives_the_input(attention: Attention) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    attention.q.id_s.register_forward_hook(lambda _m, _a, z: kept.append(weakref.ref(z)))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            x = torch.randn(4, INPUTS, requires_grad=grad)
            attention.k(x)  # and neither q nor v
        del x
        gc.collect()
        assert kept[-1]() is None


def double_input(model: Attention, x: torch.Tensor) -> None:
    x.mul_(2)


def double_weight(model: Attention, x: torch.Tensor) -> None:
    model.q.id_s.weight.mul_(2)


def replace_weight(model: Attention, x: torch.Tensor) -> None:
    model.q.id_s.weight = nn.Parameter(torch.randn_like(model.q.id_s.weight))


def move(model: Attention, x: torch.Tensor) -> None:
    model.double()
    x.data = x.data.double()


@pytest.mark.parametrize("change", [double_input, double_weight, replace_weight, move])
def test_changes_between_the_layers_are_seen(
    attention: Attention, change: Callable[[Attention, torch.Tensor], None]
) -> None:
    x = torch.randn(4, INPUTS)
    with torch.no_grad():
        attention.q(x)
        change(attention, x)
        torch.testing.assert_close(attention.k(x), attention.k.to_dense()(x))


def test_new_factors_are_seen() -> None:
    layers = make(SIZES, INPUTS, RANK)
    x = torch.randn(4, INPUTS)
    S = torch.randn(RANK, INPUTS)
    new = [
        RowID(S=S, T=torch.randn(m - layer.direct_outputs, RANK), order=layer.order)
        for m, layer in zip(SIZES, layers, strict=True)
    ]

    def through_data(module: nn.Module, name: str, value: torch.Tensor) -> None:
        getattr(module, name).data.copy_(value)  # which autograd does not see

    with torch.no_grad():
        layers[0](x)
        load_shared(layers, new, write=through_data)
        torch.testing.assert_close(layers[1](x), x @ new[1].dense().T)


def test_autograd_gets_a_graph_of_its_own_for_each_layer(attention: Attention) -> None:
    x = torch.randn(4, INPUTS, requires_grad=True)
    with torch.no_grad():
        attention.q(x)  # leaves a z without a graph
    attention.k(x).sum().backward()
    attention.v(x).sum().backward()  # after k's graph is gone
    got = x.grad.clone()  # type: ignore[union-attr]
    weight = attention.k.dense_weight().sum(0) + attention.v.dense_weight().sum(0)
    torch.testing.assert_close(got, weight.expand(4, -1))
    assert attention.q.id_s.weight.grad is not None


def test_gradients_of_the_shared_skeleton_add_up(attention: Attention) -> None:
    x = torch.randn(4, INPUTS)
    attention(x).square().sum().backward()
    got = attention.q.id_s.weight.grad
    S = attention.q.id_s.weight.detach().clone().requires_grad_()
    outputs = []
    for layer in (attention.q, attention.k, attention.v):
        assert layer.id_t is not None
        stacked = torch.cat([S, layer.id_t.weight.detach() @ S])[layer.order.long()]
        outputs.append(x @ stacked.T + layer.bias.detach())  # type: ignore[union-attr]
    torch.cat(outputs, -1).square().sum().backward()
    torch.testing.assert_close(got, S.grad, rtol=1e-4, atol=1e-4)


def test_a_frozen_model_shares_under_autograd_too(attention: Attention) -> None:
    attention.requires_grad_(False)
    calls = counted(attention.q)
    attention(torch.randn(4, INPUTS))
    assert len(calls) == 1


def test_autocast_is_no_part_of_what_is_kept(attention: Attention) -> None:
    x = torch.randn(4, INPUTS)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            attention.q(x)
        torch.testing.assert_close(attention.k(x), attention.k.to_dense()(x))


def test_inference_mode_counts_no_changes(attention: Attention) -> None:
    with torch.inference_mode():
        x = torch.randn(4, INPUTS)
        attention.q(x)
        x.mul_(2)
        torch.testing.assert_close(attention.k(x), attention.k.to_dense()(x))


def test_offloaded_weights_are_watched_where_they_are(attention: Attention) -> None:
    cache = pytest.importorskip("compressed_tensors.offload.cache")
    id_s = attention.q.id_s
    id_s._parameters = cache.CPUCache.from_mapping(id_s._parameters, onload_device="cpu")
    calls = counted(attention.q)
    x = torch.randn(4, INPUTS)
    with torch.no_grad():
        attention(x)
        assert len(calls) == 1
        attention.q(x)
        id_s._parameters["weight"] = 2 * id_s.weight  # as llm-compressor updates it
        torch.testing.assert_close(attention.k(x), attention.k.to_dense()(x))


def test_vmap(attention: Attention) -> None:
    x = torch.randn(4, INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(attention)(x), attention(x))


def test_compiled_without_a_graph_break(attention: Attention) -> None:
    x = torch.randn(4, INPUTS)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), attention(x))


@pytest.mark.parametrize("pending", [False, True])
def test_copies_are_whole_and_apart(attention: Attention, pending: bool) -> None:
    x = torch.randn(4, INPUTS)
    with torch.no_grad():
        before = attention(x)
        if pending:
            attention.q(x)
        file = io.BytesIO()
        torch.save(attention, file)
        file.seek(0)
        for other in (copy.deepcopy(attention), torch.load(file, weights_only=False)):
            assert other.k.leader is other.q and other.q is not attention.q
            other.q.id_s.weight.zero_()
            assert torch.equal(other.k(x), other.k.bias.expand(4, -1))
        torch.testing.assert_close(attention(x), before)
