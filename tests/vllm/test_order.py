"""Putting outputs in order, by itself and within a layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linears import WIDTH, Example, built, compare, inputs, load
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from cur_modifier.vllm.order import in_order, pairs_of, runs_of, side_by_side

PIECES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def pieces_of(sizes: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pieces of as many entries, and all of them next to each other."""
    entries = torch.randn(3, sum(sizes), generator=torch.Generator().manual_seed(0))
    return [*entries.split(sizes, -1)], entries


@given(PIECES, st.randoms(use_true_random=False))
def test_entries_are_gathered(sizes: list[int], random: object) -> None:
    pieces, entries = pieces_of(sizes)
    order = torch.tensor(random.sample(range(sum(sizes)), sum(sizes)))  # type: ignore[attr-defined]
    assert torch.equal(in_order(pieces, order, None), entries[:, order])
    runs = runs_of(order)
    assert (runs is None) == (int((order.diff() != 1).sum()) >= 16)
    if runs is not None:
        assert torch.equal(side_by_side(pieces, runs), entries[:, order])


@given(st.integers(1, 20), st.randoms(use_true_random=False))
def test_pairs_that_stay_together_are_found(pairs: int, random: object) -> None:
    shuffled = torch.tensor(random.sample(range(pairs), pairs))  # type: ignore[attr-defined]
    order = torch.stack([2 * shuffled, 2 * shuffled + 1], 1).flatten()
    found = pairs_of(order, 2 * pairs, torch.bfloat16)
    assert found is not None
    assert torch.equal(found, shuffled)
    y = torch.randn(3, 2 * pairs).bfloat16()
    assert torch.equal(in_order([y], order, found), y[:, order])
    assert pairs_of(order.roll(1), 2 * pairs, torch.bfloat16) is None
    assert pairs_of(order, 2 * pairs, torch.float64) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_that_stay_in_pairs_are_moved_in_pairs(dtype: torch.dtype) -> None:
    examples = {name: Example("id", 24, 1, rank=6) for name in ("gate_proj", "up_proj")}
    for seed, example in enumerate(examples.values()):
        pairs = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        order = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
        s, t = example.tensors["id_s.weight"], example.tensors["id_t.weight"]
        example.tensors["order"] = order.int()
        example.product = torch.cat([s, t @ s])[order]
    layers = built(
        MergedColumnParallelLinear,
        "gate_up_proj",
        examples,
        WIDTH,
        [24, 24],
        params_dtype=dtype,
    )
    with layers as layer:
        load(layer, examples)
        assert len(layer.output_pairs) == 24
        x = inputs()
        wanted = torch.cat([example(x) for example in examples.values()], -1)
        got = layer(x.to(dtype)).float()
        assert (got - wanted).norm() < 0.02 * wanted.norm()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x.to(dtype)).float(), got)


def test_neurons_in_order_need_no_gather() -> None:
    """Gate and up as the recipe's stage leaves them: both in the order of their products."""
    examples = {
        name: Example("id", 40, seed, rank=rank)
        for seed, (name, rank) in enumerate({"gate_proj": 12, "up_proj": 8}.items())
    }
    for example in examples.values():
        s, t = example.tensors["id_s.weight"], example.tensors["id_t.weight"]
        example.tensors["order"] = torch.arange(40).int()
        example.product = torch.cat([s, t @ s])
    layers = built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [40, 40])
    with layers as layer:
        load(layer, examples)
        compare(layer, examples)
        assert layer.output_order is None and layer.output_pairs is None
        x = inputs()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
