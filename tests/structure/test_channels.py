"""Channels are found by trying, and a network without them is the one that reads zeros for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.linalg import RemovalProblem, shrunk, solve_removal
from cur_modifier.structure.channels import norms_below, staying
from cur_modifier.structure.layers import convolution_blocks
from cur_modifier.structure.operators import matrix_of
from cur_modifier.structure.patches import rows_read
from cur_modifier.structure.removal import Kind, Units, left_of, remove
from cur_modifier.structure.search import find_units

from .vision import Chain, Tied, images, resnet, settled

CHAINS = {
    "chain": lambda: settled(Chain()),
    "no norms": lambda: settled(Chain(norms=False)),
    "no biases": lambda: settled(Chain(bias=False)),
    "pooled": lambda: settled(Chain(pooled=True)),
}


@torch.no_grad()
def found_in(model: Any, x: torch.Tensor, kinds: Sequence[Kind] = ("channels",)) -> list[Units]:
    layers = [name for name, _ in convolution_blocks(model)]
    return find_units(model, layers, kinds, lambda: model(pixel_values=x))


@torch.no_grad()
def answer(model: Any, x: torch.Tensor) -> torch.Tensor:
    out = model(pixel_values=x)
    return out if torch.is_tensor(out) else out.logits


def described(found: Sequence[Units]) -> list[tuple[str, str, int, int, tuple[str, ...]]]:
    return [
        (next(iter(u.producers)), u.consumer, u.count, u.reads.shape[1], u.norms) for u in found
    ]


def test_the_channels_of_a_chain() -> None:
    assert described(found_in(settled(Chain()), images())) == [
        ("features.0", "features.3", 6, 9, ("features.1",)),
        ("features.3", "features.7", 8, 9, ("features.4",)),
        ("features.7", "classifier", 10, 16, ("features.8",)),
    ]


@pytest.mark.parametrize(("layer_type", "each"), [("basic", 1), ("bottleneck", 2)])
def test_only_channels_inside_a_residual_block(layer_type: str, each: int) -> None:
    model = resnet(layer_type)
    found = found_in(model, images(side=32))
    blocks = [f"resnet.encoder.stages.{i}.layers.{j}" for i in range(2) for j in range(2)]
    assert [u.layer for u in found] == [b for b in blocks for _ in range(each)]
    for units in found:
        [producer] = units.producers
        assert units.consumer > producer and units.norms == (
            producer.replace("convolution", "normalization"),
        )
    reasons = staying(model, blocks, found)
    last = f"{blocks[0]}.layer.{each}.convolution"
    assert "residual sum" in reasons[last]
    assert "outside" in reasons["resnet.embedder.embedder.convolution"]
    assert not reasons.keys() & {name for units in found for name in units.producers}


@pytest.mark.parametrize("how", ["sum", "concatenation", "groups", "depthwise", "two readers"])
def test_what_is_tied_stays(how: str) -> None:
    model = settled(Tied(how))
    assert found_in(model, images(channels=6)) == []
    reasons = staying(model, [""], [])
    first = "6 groups" if how == "depthwise" else "tie its channels"
    assert first in reasons["first"]
    assert ("2 groups" in reasons["second"]) == (how == "groups")


def test_untied_it_is_found() -> None:
    [units] = found_in(settled(Tied("nothing")), images(channels=6))
    assert (units.consumer, units.norms) == ("second", ("norm",))


@pytest.mark.parametrize("name", [*CHAINS, "basic", "bottleneck"])
def test_without_channels_the_network_is_the_one_that_reads_zeros(name: str) -> None:
    model = CHAINS[name]() if name in CHAINS else resnet(name)
    x = images(side=8 if name in CHAINS else 32)
    whole = answer(model, x)
    found = found_in(model, x)
    assert found
    zeroed, smaller = copy.deepcopy(model), copy.deepcopy(model)
    for place, units in enumerate(found):
        order = torch.randperm(units.count, generator=torch.Generator().manual_seed(place))
        kept = order[: units.count // 2].sort().values
        axis, left = left_of(units, kept, model.get_submodule(units.consumer))
        gone = torch.ones(model.get_submodule(units.consumer).weight.shape[1], dtype=torch.bool)
        gone[left] = False

        def blank(_: Any, args: Any, axis: int = axis, gone: torch.Tensor = gone) -> Any:
            return (args[0].index_fill(axis, gone.nonzero().flatten(), 0.0), *args[1:])

        zeroed.get_submodule(units.consumer).register_forward_pre_hook(blank)
        remove(smaller, units, kept)
        for norm in units.norms:
            assert smaller.get_submodule(norm).num_features == len(kept)
    wanted = answer(zeroed, x)
    assert (wanted - whole).norm() > 0.01 * whole.norm()
    torch.testing.assert_close(answer(smaller, x), wanted, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(answer(model, x), whole)  # the search and the copies changed nothing


@pytest.mark.parametrize("kind", ["dead", "duplicated"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_dead_and_duplicated_channels_go_without_loss(kind: str, place: int) -> None:
    model = settled(Chain())
    units = found_in(model, images())[place]
    [producer] = units.producers
    norm = model.get_submodule(units.norms[0])
    if kind == "dead":  # behind the activation
        norm.weight.data[2], norm.bias.data[2] = 0.0, -1.0
    else:
        for module in (model.get_submodule(producer), norm):
            for tensor in module.state_dict().values():
                if tensor.ndim:
                    tensor[2] = tensor[4]
    x = images(400)  # more than the classifier has inputs
    before = answer(model, x)
    consumer = model.get_submodule(units.consumer)
    read: list[torch.Tensor] = []
    handle = consumer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    answer(model, x)
    handle.remove()
    rows = torch.cat([part for (part,) in rows_read(consumer, read[0], seed=0)]).double()
    W = matrix_of(consumer)
    solved = solve_removal(
        RemovalProblem(W, shrunk(rows.T @ rows / len(rows), 0.0), units.reads, units.count - 1)
    )
    remove(model, units, solved.kept, solved.weight)
    torch.testing.assert_close(answer(model, x), before, rtol=1e-3, atol=1e-3)


def test_neurons_of_a_classifier_are_found_beside_channels() -> None:
    model = settled(Chain())
    model.classifier = nn.Sequential(nn.Linear(160, 12), nn.ReLU(), nn.Linear(12, 5))
    settled(model)
    found = found_in(model, images(), ("channels", "neurons"))
    assert [u.kind for u in found] == ["channels"] * 3 + ["neurons"]
    assert found[2].consumer == "classifier.0" and found[3].consumer == "classifier.2"


def test_norms_are_those_of_the_layers() -> None:
    model = resnet()
    layer = "resnet.encoder.stages.0.layers.0"
    assert len(norms_below(model, [layer])) == 2
    assert len(norms_below(model, [""])) == 10
