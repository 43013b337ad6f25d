"""Row ID layers, alone and on a skeleton that they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cur_modifier.forms.row_id import RowIDLinear, load_shared, shared_skeleton
from cur_modifier.linalg import RowID, interpolative, split_rows

from .shared import INPUTS, RANK, SIZES, Attention, make, parts_of


@pytest.fixture
def attention() -> Attention:
    return Attention(make(SIZES, INPUTS, RANK, bias=True))


def test_bad_ranks_are_named() -> None:
    with pytest.raises(ValueError, match=r"rank 0 is outside"):
        RowIDLinear(6, 8, 0)
    with pytest.raises(ValueError, match=r"leaves no output to interpolate.*Leave the layer dense"):
        RowIDLinear(8, 6, 6)


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
