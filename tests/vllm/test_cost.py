"""The cost model, by itself and against what a loaded layer holds."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from linears import (
    QKV,
    QKV_SIZES,
    WIDTH,
    Example,
    built,
    hand_over,
    linears_below,
    one_of_each_form,
    pretend,
    sharing,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)

from cur_modifier.vllm.cost import CHEAP_BYTES, Chain, Cost, blocks, cost, save_too_little
from cur_modifier.vllm.forms import served
from cur_modifier.vllm.parts import Schemes, by_skeleton
from cur_modifier.vllm.stages import stacks

SIZES = st.integers(1, 500)


@dataclass
class Factors:
    rows: int
    chains: list[list[tuple[int, int]]] = field(default_factory=list)

    def shapes(self) -> list[list[tuple[int, int]]]:
        return self.chains


def adjacent(*shapes: tuple[int, int]) -> list[Chain]:
    """Chains of one product each, of adjacent entries."""
    ends = [*itertools.accumulate((columns for _, columns in shapes), initial=0)]
    return [Chain(*ends[i : i + 2], (shape,)) for i, shape in enumerate(shapes)]


def test_small_neighbours_become_one_block() -> None:
    assert blocks(adjacent((8, 4), (9, 3), (7, 2)), 4) == [slice(0, 3)]


def test_zeros_that_cost_more_than_a_product_are_not_read() -> None:
    side = 100
    zeros = 2 * side * side
    itemsize = CHEAP_BYTES // zeros
    chains = adjacent((side, side), (side, side))
    assert blocks(chains, itemsize) == [slice(0, 2)]
    assert blocks(chains, itemsize + 1) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize(
    "middle",
    [
        Chain(4, 7, ((9, 9), (9, 3))),  # two products, one after another
        Chain(4, 7, ()),  # a quantized one
        Chain(5, 8, ((9, 3),)),  # entry 4 is nobody's
    ],
)
def test_only_single_plain_products_of_adjacent_entries_are_joined(middle: Chain) -> None:
    first, last = Chain(0, 4, ((8, 4),)), Chain(9, 11, ((7, 2),))
    assert blocks([first, middle, last], 4) == [slice(0, 1), slice(1, 2), slice(2, 3)]


@given(st.lists(st.tuples(SIZES, SIZES), max_size=6), st.sampled_from([2, 4]))
def test_every_chain_is_in_one_block(shapes: list[tuple[int, int]], itemsize: int) -> None:
    found = blocks(adjacent(*shapes), itemsize)
    covered = [index for block in found for index in range(block.start, block.stop)]
    assert covered == [*range(len(shapes))]


@given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=6), SIZES)
def test_joining_never_makes_dearer(shapes: list[tuple[int, int]], inputs: int) -> None:
    stack = [Factors(columns, [[(rows, columns)]]) for rows, columns in shapes]
    found = cost([stack], inputs, 4)
    apart = sum(columns * (inputs + rows) for rows, columns in shapes)
    spared = 1 + len(shapes) - found.products
    assert 0 <= (found.numbers - apart) * 4 <= spared * CHEAP_BYTES


def test_the_cost_counts_every_product() -> None:
    pair = Factors(3, [[(10, 3)]])
    three = Factors(4, [[(4, 4), (10, 4)]])
    dense = Factors(6)
    numbers = (3 + 4 + 6) * 20 + 10 * 3 + 4 * 4 + 10 * 4
    assert cost([[pair, three, dense]], 20, 4) == Cost(numbers, 1 + 1 + 2)
    assert cost([[dense], [pair, three]], 20, 4) == Cost(numbers, 2 + 1 + 2)


def test_a_product_must_save_as_much_as_it_costs() -> None:
    rows, inputs = 100, 1000
    stack = [[Factors(rows, [[(inputs - rows, rows)]])]]
    kept = cost(stack, inputs, 4).numbers
    outputs = (kept + CHEAP_BYTES // 4) // inputs  # at which they save what a product costs
    assert save_too_little(stack, outputs - 1, inputs, 4)
    assert not save_too_little(stack, outputs + 1, inputs, 4)


def weights_below(layer: Any) -> Cost:
    """What the weights of the layer's products hold."""
    found = [module for module in layer.products.modules() if isinstance(module, LinearBase)]
    return Cost(sum(module.weight.numel() for module in found), len(found))


def expected(layer: Any, inputs: int) -> Cost:
    """What they would hold, from the shapes of the layer's parts."""
    schemes = Schemes(None, layer)
    factors = [served(together, schemes) for together in by_skeleton(layer.quant_method.parts)]
    return cost(stacks(factors, schemes), inputs, 4)


IDS = {name: Example("id", out, seed) for seed, (name, out) in enumerate(QKV.items())}
# k and v leave their CUR as it is: its rank is as large as their outputs on two ranks.
SQUARE = {name: Example("cur", out, 1, rank=8) for name, out in QKV.items()} | {
    "q_proj": Example("id", QKV["q_proj"], 0)
}


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize(
    "examples",
    [one_of_each_form(), IDS, SQUARE, sharing(QKV, "k_proj", 12)],
    ids=["each form", "row IDs", "square", "shared"],
)
def test_what_factors_read_is_known_from_their_shapes(
    examples: dict[str, Example], rank: int
) -> None:
    layers = built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES)
    with pretend(rank, 2), layers as layer:
        hand_over(layer, examples)
        layer.quant_method.process_weights_after_loading(layer)  # and not the Linears below
        assert weights_below(layer) == expected(layer, WIDTH)


def test_wide_products_are_known_to_stay_apart() -> None:
    width = 640  # at which the zeros of a block matrix are not cheap
    wide = {
        name: Example("id", width, 0, width=width, rank=320) for name in ("gate_proj", "up_proj")
    }
    with built(MergedColumnParallelLinear, "gate_up_proj", wide, width, [width, width]) as layer:
        hand_over(layer, wide)
        layer.quant_method.process_weights_after_loading(layer)
        assert weights_below(layer) == expected(layer, width)
        assert len(linears_below(layer)) == 3
