"""Layers that share a skeleton compute it once, and never from what is no longer true."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cur_modifier.forms.row_id import RowIDLinear, load_shared, shared_skeleton
from cur_modifier.linalg import RowID, interpolative, split_rows

SIZES = [8, 4, 4]
INPUTS, RANK = 6, 5


def parts_of(W: torch.Tensor, sizes: list[int], rank: int) -> list[RowID]:
    return split_rows(interpolative(W, rank), sizes)


def make(
    sizes: list[int],
    n: int,
    rank: int,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[RowIDLinear]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(sum(sizes), n, generator=generator)
    parts = parts_of(W, sizes, rank)
    biases = [torch.randn(m, generator=generator) if bias else None for m in sizes]
    layers = shared_skeleton(
        n,
        sizes,
        rank,
        [part.direct_outputs for part in parts],
        bias=[bias] * len(sizes),
        dtype=dtype,
    )
    load_shared(layers, parts, biases)
    return layers


class Attention(nn.Module):
    """A module that hands one tensor to its projections, as models do."""

    def __init__(self, layers: list[RowIDLinear]) -> None:
        super().__init__()
        self.q, self.k, self.v = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


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


@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    n=st.integers(1, 10),
    rank=st.integers(1, 31),
    bias=st.booleans(),
    grad=st.booleans(),
    batch=st.sampled_from([(), (3,), (2, 5)]),
    seed=st.integers(0, 99),
)
def test_every_layer_is_its_dense_product(
    sizes: list[int],
    n: int,
    rank: int,
    bias: bool,
    grad: bool,
    batch: tuple[int, ...],
    seed: int,
) -> None:
    rank = min(rank, n, sum(sizes) - 1)
    if rank == 0:
        return
    layers = make(sizes, n, rank, bias=bias, dtype=torch.float64, seed=seed)
    x = torch.randn(*batch, n, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        for layer, m in zip(layers, sizes, strict=True):
            dense = layer.to_dense()
            assert dense.weight.shape == (m, n) and (dense.bias is not None) == bias
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-9, atol=1e-9)


def test_outputs_that_are_all_in_the_skeleton_need_no_interpolation() -> None:
    W = torch.randn(8, 6)
    rows = torch.tensor([0, 1, 2, 5])
    parts = split_rows(interpolative(W, 4, rows=rows), [3, 3, 2])
    layers = shared_skeleton(6, [3, 3, 2], 4, [p.direct_outputs for p in parts])
    load_shared(layers, parts)
    assert [layer.direct_outputs for layer in layers] == [3, 1, 0]
    assert layers[0].id_t is None and list(layers[0].factors) == ["id_s"]
    assert list(layers[1].factors) == list(layers[2].factors) == ["id_t"]
    x = torch.randn(5, 6)
    assert torch.equal(layers[0].to_dense().weight, W[:3])
    torch.testing.assert_close(layers[0](x), x @ W[:3].T)
    torch.testing.assert_close(layers[2](x), layers[2].to_dense()(x))


def test_the_skeleton_is_stored_and_found_once(attention: Attention) -> None:
    stored = [name for name in attention.state_dict() if "id_s" in name]
    assert stored == ["q.id_s.weight"]
    found = [name for name, _ in attention.named_modules() if name.endswith("id_s")]
    assert found == ["q.id_s"]
    without_bias = Attention(make(SIZES, INPUTS, RANK))
    assert sum(p.numel() for p in without_bias.parameters()) == RANK * (sum(SIZES) + INPUTS - RANK)
    assert without_bias.k.leader is without_bias.q and without_bias.q.leader is None


def test_state_round_trip(attention: Attention) -> None:
    direct = [layer.direct_outputs for layer in (attention.q, attention.k, attention.v)]
    other = Attention(shared_skeleton(INPUTS, SIZES, RANK, direct, bias=[True] * 3))
    other.load_state_dict(attention.state_dict())
    x = torch.randn(4, INPUTS)
    assert torch.equal(other(x), attention(x))


def test_meta_device_allocates_nothing() -> None:
    layers = shared_skeleton(INPUTS, SIZES, RANK, [3, 1, 1], device="meta")
    assert all(t.is_meta for layer in layers for t in layer.state_dict().values())
    with torch.no_grad():
        x = torch.empty(2, INPUTS, device="meta")
        assert [layer(x).shape for layer in layers] == [(2, m) for m in SIZES]


# What is computed, and how often


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


# Before the fit


def test_each_layer_answers_with_its_stand_in() -> None:
    W = torch.randn(sum(SIZES), INPUTS)
    parts = parts_of(W, SIZES, RANK)
    layers = shared_skeleton(INPUTS, SIZES, RANK, [p.direct_outputs for p in parts])
    denses = [nn.Linear(INPUTS, m, bias=False) for m in SIZES]
    for layer, dense in zip(layers, denses, strict=True):
        layer.stand_in(dense)
    x = torch.randn(2, INPUTS)
    assert all(torch.equal(la(x), de(x)) for la, de in zip(layers, denses, strict=True))
    with pytest.raises(ValueError, match=r"the leader.*has no fitted factors yet.*load_shared"):
        layers[1].load_factors(parts[1])
    layers[0].load_factors(parts[0])
    layers[1].load_factors(parts[1])
    torch.testing.assert_close(layers[1](x), x @ parts[1].dense().T)
    assert torch.equal(layers[2](x), denses[2](x))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([4, 4], 3, [1, 1]), r"\[1, 1\] add up to 2, not to the rank 3"),
        (([4, 4], 8, [4, 4]), r"rank 8 leaves none of the 8 outputs.*Lower the rank"),
        (([4, 4], 3, [3]), r"2 out_features, 1 direct_outputs and 2 bias"),
        (([], 3, []), "0 out_features"),
        (([2, 8], 3, [3, 0]), r"3 direct outputs are outside 0..2 for a 2x8 layer at rank 3"),
        (([4, 8], 3, [-1, 4]), r"-1 direct outputs are outside 0..3"),
        (([8, 8], 9, [4, 5]), r"rank 9 is outside 1..8 for a 8x8"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments: Any, message: str) -> None:
    out_features, rank, direct = arguments
    with pytest.raises(ValueError, match=message):
        shared_skeleton(8, out_features, rank, direct)


def test_leaders_that_cannot_lead_are_named() -> None:
    leader, follower = shared_skeleton(8, [6, 6], 4, [2, 2])
    with pytest.raises(ValueError, match=r"leader uses the skeleton of another layer"):
        RowIDLinear(8, 6, 4, direct_outputs=1, leader=follower)
    with pytest.raises(ValueError, match=r"leader has 8 inputs and rank 4, this layer 8 and 3"):
        RowIDLinear(8, 6, 3, direct_outputs=1, leader=leader)


def test_factors_that_do_not_fit_are_named() -> None:
    layers = make(SIZES, INPUTS, RANK)
    W = torch.randn(sum(SIZES), INPUTS, generator=torch.Generator().manual_seed(0))
    parts = parts_of(W, SIZES, RANK - 1)
    assert parts[0].direct_outputs < parts[0].rank
    before = [p.clone() for layer in layers for p in layer.parameters()]
    with pytest.raises(ValueError, match=r"the factors have .* = \(8, 6, 4, .*the layer \(8, 6, 5"):
        load_shared(layers, parts)
    with pytest.raises(ValueError, match=r"the factors have .*shared_skeleton makes layers"):
        RowIDLinear.from_factors(parts[0])
    other = RowID(S=parts[1].S + 1, T=parts[1].T, order=parts[1].order)
    with pytest.raises(ValueError, match=r"different skeletons.*split_rows"):
        load_shared(layers, [parts[0], other, parts[2]])
    with pytest.raises(ValueError, match=r"do not share the first one's skeleton"):
        load_shared(layers[::-1], parts)
    with pytest.raises(ValueError, match=r"3 layers, 2 factors and 2 biases"):
        load_shared(layers, parts[:2], [None, None])
    after = [p for layer in layers for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
