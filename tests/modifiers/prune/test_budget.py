"""How many units stay: never more than the budget allows, and where the loss grows least."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.prune.budget import Costs, by_sensitivity, costs_of, evenly
from cur_modifier.modifiers.prune.config import BudgetConfig
from cur_modifier.modifiers.report import parameter_count
from cur_modifier.passes.context import trial
from cur_modifier.structure.layers import convolution_blocks, decoder_layers
from cur_modifier.structure.patches import count_positions
from cur_modifier.structure.removal import Kind, Units, remove
from cur_modifier.structure.search import find_units

SEEDS = st.integers(0, 999)


def units_of(layers: int, kinds: Mapping[Kind, int]) -> list[Units]:
    return [
        Units(f"{k}", kind, {}, f"{k}.{kind}", torch.arange(count)[:, None])
        for k in range(layers)
        for kind, count in kinds.items()
    ]


def convex_growth(units: Sequence[Units], seed: int) -> dict[str, torch.Tensor]:
    """What the loss grows by with so many kept: each unit that goes costs more than the last."""
    generator = torch.Generator().manual_seed(seed)
    growth = {}
    for each in units:
        steps = torch.rand(each.count, generator=generator).double().sort().values
        scale = float(torch.randn(1, generator=generator).exp())
        growth[each.consumer] = scale * torch.cat([torch.zeros(1), steps]).cumsum(0).flip(0)
    return growth


def grown(growth: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> float:
    return sum(float(growth[name][count]) for name, count in counts.items())


@st.composite
def problems(draw, kinds=(("neurons", 12), ("heads", 4))):
    """Units of some layers, what each costs and adds to the loss, and a budget."""
    layers = draw(st.integers(1, 4))
    units = units_of(layers, dict(kinds[: draw(st.integers(1, len(kinds)))]))
    prices = {"neurons": draw(st.integers(1, 9)), "heads": draw(st.integers(10, 99))}
    costs = Costs(
        {each.consumer: prices[each.kind] for each in units},
        sum(each.count * prices[each.kind] for each in units) + draw(st.integers(0, 200)),
    )
    multiples: dict[Kind, int] = {"neurons": draw(st.integers(1, 4)), "heads": 1}
    budget = BudgetConfig(ratio=draw(st.floats(0.3, 0.99)), least=draw(st.sampled_from([0, 0.3])))
    return units, costs, convex_growth(units, draw(SEEDS)), budget, multiples


def chosen(problem: Any, *, alike: bool) -> dict[str, int]:
    units, costs, growth, budget, multiples = problem
    try:
        return by_sensitivity(units, costs, growth, budget, multiples, alike=alike)
    except ValueError as error:
        assert "Raise the budget" in str(error)
        return {}


@given(problems(), st.booleans())
def test_a_budget_is_never_exceeded(problem: Any, alike: bool) -> None:
    units, costs, _, budget, multiples = problem
    assume(counts := chosen(problem, alike=alike))
    assert counts.keys() == {each.consumer for each in units}
    assert costs.left(units, counts) <= budget.share * costs.total
    for each in units:
        kept = counts[each.consumer]
        assert 1 <= kept <= each.count
        assert kept == each.count or kept % multiples[each.kind] == 0
        # A multiple that keeps the least may not be there; then all stay.
        assert kept >= budget.least * each.count


@given(problems())
def test_alike_layers_have_one_count_a_kind(problem: Any) -> None:
    assume(counts := chosen(problem, alike=True))
    for kind in ("neurons", "heads"):
        assert len({counts[u.consumer] for u in problem[0] if u.kind == kind}) <= 1


@given(problems(kinds=(("neurons", 12),)))
def test_alike_layers_of_one_kind_keep_the_even_share(problem: Any) -> None:
    units, costs, _, budget, multiples = problem
    assume(counts := chosen(problem, alike=True))
    assert counts == evenly(units, costs, budget, multiples)


@given(problems(kinds=(("neurons", 12),)))
def test_the_loss_grows_no_more_than_with_even_shares(problem: Any) -> None:
    units, costs, growth, budget, multiples = problem
    assume(counts := chosen(problem, alike=False))
    even = evenly(units, costs, budget, multiples)
    assert grown(growth, counts) <= grown(growth, even) + 1e-9


@given(problems(), st.booleans())
def test_it_is_the_best_up_to_one_step(problem: Any, alike: bool) -> None:
    """Prices of unlike steps may leave a rest of the budget that no step fits."""
    units, costs, growth, budget, multiples = problem
    units = [each for each in units if int(each.layer) < 2]
    assume(counts := chosen((units, costs, growth, budget, multiples), alike=alike))
    groups = [[u for u in units if u.kind == kind] for kind in sorted(by_kind(units))]
    if not alike:
        groups = [[each] for each in units]

    def options(group: list[Units]) -> list[int]:
        [count, *_] = [each.count for each in group]
        step = multiples[group[0].kind]
        least = [k for k in range(step, count, step) if k >= budget.least * count]
        return [*least, count]

    trials = (
        {u.consumer: kept for group, kept in zip(groups, picked, strict=True) for u in group}
        for picked in product(*map(options, groups))
    )
    allowed = budget.share * costs.total
    best = min(grown(growth, each) for each in trials if costs.left(units, each) <= allowed)
    step = max(
        sum(float(growth[u.consumer][low] - growth[u.consumer][high]) for u in group)
        for group in groups
        for low, high in pairwise(options(group))
    )
    assert best - 1e-9 <= grown(growth, counts) <= best + step + 1e-9


def by_kind(units: Sequence[Units]) -> set[Kind]:
    return {each.kind for each in units}


@given(problems())
def test_even_shares_are_the_largest_within_the_budget(problem: Any) -> None:
    units, costs, _, budget, multiples = problem
    try:
        counts = evenly(units, costs, budget, multiples)
    except ValueError as error:
        assert "the smallest counts that may be kept leave" in str(error)
        least = {u.consumer: min(multiples[u.kind], u.count) for u in units}
        assert costs.left(units, least) > budget.share * costs.total
        return
    assert costs.left(units, counts) <= budget.share * costs.total
    for kind in by_kind(units):
        assert len({counts[u.consumer] for u in units if u.kind == kind}) == 1
    # One step more of every kind is too much.
    more = {u.consumer: min(counts[u.consumer] + multiples[u.kind], u.count) for u in units}
    assert costs.left(units, more) > budget.share * costs.total
    # One share makes all of them, rounded down.
    pairs = [(counts[u.consumer], u.count, multiples[u.kind]) for u in units]
    at_least = max((kept / count for kept, count, step in pairs if kept > step), default=0.0)
    assert all((kept + step) / count > at_least - 1e-9 for kept, count, step in pairs)


def test_units_that_the_loss_does_not_mind_go_first() -> None:
    units = units_of(2, {"neurons": 8})
    costs = Costs(dict.fromkeys(("0.neurons", "1.neurons"), 5), 80)
    growth = {
        "0.neurons": torch.tensor([torch.inf, *[0.0] * 8]),
        "1.neurons": torch.tensor([torch.inf, *range(8, 0, -1)]) - 1,
    }
    found = by_sensitivity(
        units, costs, growth, BudgetConfig(ratio=0.75, least=0.25), {"neurons": 2}, alike=False
    )
    assert found["1.neurons"] == 8 and 2 <= found["0.neurons"] <= 4


@pytest.mark.parametrize("measure", ["ratio", "macs"])
@pytest.mark.parametrize("by", ["sensitivity", "uniform"])
def test_a_budget_that_no_counts_meet_is_named_with_the_remedy(measure: str, by: str) -> None:
    units = units_of(2, {"neurons": 8})
    costs = Costs(dict.fromkeys(("0.neurons", "1.neurons"), 5), 100)
    budget = BudgetConfig(**{measure: 0.25}, least=0.25)
    what = "multiply-accumulates" if measure == "macs" else "parameters"
    message = (
        rf"budget {measure} 0\.25 allows 25 of 100 {what}, and the smallest counts that may be "
        rf"kept leave 40 \(0\.400\)\. Raise the budget, lower `budget\.least` \(0\.25\) or "
        r"`multiple_of`, or name more kinds"
    )
    with pytest.raises(ValueError, match=message):
        if by == "uniform":
            evenly(units, costs, budget, {"neurons": 2})
        else:
            growth = convex_growth(units, 0)
            by_sensitivity(units, costs, growth, budget, {"neurons": 2}, alike=True)


# -- what is counted -----------------------------------------------------------------------------


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4))


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
    return BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


@pytest.fixture(params=["Llama", "Llama with biases", "GPT2", "BERT"])
def dense(request: pytest.FixtureRequest, small_llama: Callable[..., Any]) -> Any:
    if request.param.startswith("Llama"):
        biases = request.param.endswith("biases")
        model = small_llama(
            0,
            num_hidden_layers=2,
            tie_word_embeddings=True,
            attention_bias=biases,
            mlp_bias=biases,
        )
    else:
        model = gpt2() if request.param == "GPT2" else bert()
    # Its weights tell heads apart, or attention would be blind to them.
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def found_in(model: Any) -> list[Units]:
    with trial(model) as run:
        layers = [name for name, _ in decoder_layers(model)]
        return find_units(model, layers, ["heads", "neurons"], run)


def pruned(model: Any, units: Sequence[Units]) -> tuple[Any, dict[str, int]]:
    """A copy that keeps other counts in every layer."""
    small, counts = copy.deepcopy(model), {}
    for k, each in enumerate(units):
        counts[each.consumer] = kept = 1 + k % (each.count - 1)
        remove(small, each, torch.arange(kept))
    return small, counts


def macs(model: Any, layers: set[str], tokens: int) -> int:
    """Multiply-accumulates of layers in one sequence, as PyTorch counts them."""
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None])
    counted = counter.get_flop_counts()
    return sum(sum(counted[f"{type(model).__name__}.{n}"].values()) for n in layers) // 2


def test_parameters_of_layers_are_those_that_go(dense: Any) -> None:
    units = found_in(dense)
    layers = {each.layer for each in units}
    costs = costs_of(dense, units, "ratio", 1)
    small, counts = pruned(dense, units)
    for model, kept in ((dense, {u.consumer: u.count for u in units}), (small, counts)):
        real = sum(parameter_count(model.get_submodule(name)) for name in layers)
        assert costs.left(units, kept) == real


def test_parameters_of_the_model_are_those_that_go(dense: Any) -> None:
    units = found_in(dense)
    costs = costs_of(dense, units, "parameters", 1)
    small, counts = pruned(dense, units)
    assert costs.total == parameter_count(dense)
    assert costs.left(units, counts) == parameter_count(small) < costs.total


@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_multiply_accumulates_are_those_that_go(dense: Any, tokens: int) -> None:
    units = found_in(dense)
    layers = {each.layer for each in units}
    costs = costs_of(dense, units, "macs", tokens)
    small, counts = pruned(dense, units)
    assert costs.total == macs(dense, layers, tokens)
    assert costs.left(units, counts) == macs(small, layers, tokens) < costs.total


def test_layers_without_units_are_counted_with_the_model_alone(dense: Any) -> None:
    units = [each for each in found_in(dense) if each.kind == "neurons"][:1]
    ratio, whole = (costs_of(dense, units, measure, 1) for measure in ("ratio", "parameters"))
    assert ratio.total == parameter_count(dense.get_submodule(units[0].layer)) < whole.total
    assert ratio.unit == whole.unit


# -- convolutions ----------------------------------------------------------------------------------


class Chain(nn.Module):
    """Four convolutions and a Linear: each removal makes the next convolution smaller, too."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 12, 10, 6)
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(m, n, 3, stride=1 + k % 2, padding=1), nn.BatchNorm2d(n))
                for k, (m, n) in enumerate(pairwise(widths))
            )
        )
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.head(self.convolutions(pixel_values).relu().flatten(1))
        return answer


@pytest.fixture(params=["chain", "basic", "bottleneck"])
def network(request: pytest.FixtureRequest, small_resnet: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    if request.param == "chain":
        return Chain().eval()
    return small_resnet(0, layer_type=request.param, hidden_sizes=[32, 64])


def channels_of(model: Any) -> tuple[list[Units], dict[str, int]]:
    image = {"pixel_values": torch.randn(1, 3, 16, 16)}
    layers = [name for name, _ in convolution_blocks(model)]
    with trial(model, image) as run:
        return find_units(model, layers, ["channels"], run), count_positions(model, run)


def macs_of_images(model: Any, layers: set[str]) -> int:
    """As PyTorch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 16, 16))
    counted = counter.get_flop_counts()
    name = type(model).__name__
    return sum(sum(counted[f"{name}.{n}" if n else name].values()) for n in layers) // 2


def test_what_convolutions_share_is_counted_once(network: Any) -> None:
    units, positions = channels_of(network)
    layers = {each.layer for each in units}
    small, counts = pruned(network, units)
    macs_costs = costs_of(network, units, "macs", 128, positions)
    assert macs_costs.total == macs_of_images(network, layers)
    assert macs_costs.left(units, counts) == macs_of_images(small, layers) < macs_costs.total
    for measure in ("ratio", "parameters"):
        costs = costs_of(network, units, measure, 128, positions)
        names = layers if measure == "ratio" else {""}
        for model, kept in ((network, {u.consumer: u.count for u in units}), (small, counts)):
            real = sum(parameter_count(model.get_submodule(name)) for name in names)
            assert costs.left(units, kept) == real


@pytest.mark.parametrize("by", ["sensitivity", "uniform"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.25])
@pytest.mark.parametrize("measure", ["macs", "ratio"])
def test_a_budget_of_convolutions_is_kept_and_spent(
    network: Any, by: str, share: float, measure: Any
) -> None:
    units, positions = channels_of(network)
    costs = costs_of(network, units, measure, 128, positions)
    budget = BudgetConfig(**{measure: share}, by=by, least=0.0)
    if by == "uniform":
        counts = evenly(units, costs, budget, {"channels": 1})
    else:
        growth = convex_growth(units, 3)
        counts = by_sensitivity(units, costs, growth, budget, {"channels": 1}, alike=False)
    left = costs.left(units, counts) / costs.total
    assert share - (0.2 if by == "uniform" else 0.1) < left <= share


def test_too_small_a_budget_of_convolutions_is_named() -> None:
    units, positions = channels_of(Chain().eval())
    costs = costs_of(Chain(), units, "macs", 128, positions)
    growth = convex_growth(units, 3)
    with pytest.raises(ValueError, match=r"budget macs 0\.01 allows .*Raise the budget"):
        by_sensitivity(units, costs, growth, BudgetConfig(macs=0.01), {"channels": 1}, alike=False)
