"""Both models side by side: what a layer's modules read, and how often its parts are run for it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn

from cur_modifier.forms.base import FactoredLinear
from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.linalg import interpolative

pytest.importorskip("llmcompressor")

from cur_modifier.passes.streams import LayerStreams

BATCHES = 3


@pytest.fixture
def model(small_llama: Callable[..., nn.Module]) -> nn.Module:
    return small_llama(0, num_hidden_layers=2)


def factor_in_place(model: nn.Module) -> dict[str, FactoredLinear]:
    """A row ID for every projection of every layer, which answers with its dense weight."""
    found: dict[str, FactoredLinear] = {}
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            container = RowIDLinear(linear.in_features, linear.out_features, 4)
            container.stand_in(linear)
            parent, _, child = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), child, container)
            found[name] = container
    return found


def fit(container: FactoredLinear) -> None:
    container.load_factors(interpolative(container.dense.weight.detach(), container.rank))


@contextmanager
def calls(modules: dict[str, nn.Module]) -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: counted.update([name])

    hooks = [m.register_forward_hook(count(name)) for name, m in modules.items()]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def calibration() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, 64, (2, 10), generator=generator), "use_cache": False}
        for _ in range(BATCHES)
    ]


def streams_of(model: nn.Module) -> LayerStreams:
    return LayerStreams(model, list(model.model.layers), calibration(), torch.device("cpu"))


def moments_of_a_layer(
    streams: LayerStreams, containers: dict[str, FactoredLinear], forget: Callable[[], Any]
) -> dict[str, torch.Tensor]:
    """Fit a layer as the stage does, group by group."""
    here = {n: c for n, c in containers.items() if n.startswith(f"{streams.depth}.")}
    outputs, inputs, groups = streams.run_dense(here, keep_inputs=True)
    assert [len(group) for group in groups] == [3, 1, 2, 1]
    grams = {}
    for group in groups:
        forget()
        first = here[group[0]]
        moments = streams.moments(first, inputs[group[0]], first.in_features)
        grams[group[0]] = torch.stack(moments.moments())
        for name in group:
            fit(here[name])
    forget()
    streams.advance(outputs, changed=True)
    return grams


def test_nothing_is_run_twice_for_one_layer(model: nn.Module) -> None:
    containers = factor_in_place(model)
    streams = streams_of(model)
    with torch.no_grad(), calls(containers) as counted:
        moments_of_a_layer(streams, containers, forget=lambda: None)
    # Once in the dense stream, once in the compressed one.
    assert counted == {name: 2 * BATCHES for name in containers if name.startswith("0.")}


def test_parts_that_are_not_run_again_answer_the_same(model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    found = []
    for each, replayed in ((model, True), (plain, False)):
        containers = factor_in_place(each)
        streams = streams_of(each)
        forget = (lambda: None) if replayed else streams._ends.clear
        layers = [moments_of_a_layer(streams, containers, forget) for _ in range(2)]
        found.append((layers, [batch.compressed for batch in streams.batches]))
    (grams, hidden), (expected, expected_hidden) = found
    for got, wanted in zip(grams, expected, strict=True):
        assert got.keys() == wanted.keys()
        for name in got:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=0)
    torch.testing.assert_close(hidden, expected_hidden, rtol=0, atol=0)


def test_a_part_that_does_more_behind_its_last_linear_is_run_whole(model: nn.Module) -> None:
    layer = model.model.layers[0]
    whole = layer.self_attn.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out, weights = whole(*args, **kwargs)
        return out.mul_(2), weights  # the same tensor, with other numbers

    layer.self_attn.forward = scaled
    containers = factor_in_place(model)
    streams = streams_of(model)
    with torch.no_grad():
        here = {n: c for n, c in containers.items() if n.startswith("0.")}
        streams.run_dense(here, keep_inputs=False)
    assert [end.module for end in streams._ends] == [layer.mlp.down_proj]


def test_a_module_that_some_windows_do_not_reach_is_paired_with_its_own(model: nn.Module) -> None:
    layer = model.model.layers[0]
    expert = nn.Linear(*reversed(layer.mlp.up_proj.weight.shape), bias=False)
    layer.mlp.expert = expert
    whole, call = layer.mlp.forward, count()

    def routed(x: torch.Tensor) -> torch.Tensor:
        return whole(x) if next(call) % BATCHES == 0 else whole(x) + 0 * expert(x).sum()

    streams = streams_of(model)
    layer.mlp.forward = routed
    with torch.no_grad():
        _, inputs, groups = streams.run_dense({"expert": expert}, keep_inputs=True)
        assert groups == [["expert"]] and list(inputs["expert"]) == list(range(1, BATCHES))
        _, drift = streams.moments(expert, inputs["expert"], expert.in_features).moments()
    assert not drift.any()


def test_the_streams_part_at_the_first_layer_that_is_changed(model: nn.Module) -> None:
    streams = streams_of(model)
    parted = []
    for index, changed in enumerate((False, True)):
        outputs, _, _ = streams.run_dense({}, keep_inputs=False)
        if changed:
            with torch.no_grad():
                model.model.layers[index].mlp.down_proj.weight.mul_(2)  # a Linear as before
        streams.advance(outputs, changed=changed)
        parted.append(not torch.equal(streams.batches[0].compressed, streams.batches[0].dense))
    assert parted == [False, True]


def test_a_cache_that_passes_would_share_is_refused(model: nn.Module) -> None:
    batches = [{"input_ids": torch.zeros(1, 4, dtype=torch.long), "use_cache": True}]
    with pytest.raises(ValueError, match="use_cache=False"):
        LayerStreams(model, list(model.model.layers), batches, torch.device("cpu"))


def inputs_of(model: nn.Module, name: str) -> torch.Tensor:
    """What a module of the first layer reads in the calibration batches, token by token."""
    read: list[torch.Tensor] = []
    module = model.model.layers[0].get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        for batch in calibration():
            model(**batch)
    handle.remove()
    return torch.cat([x.flatten(0, 1) for x in read]).double()


def test_moments_with_the_constant_hold_means(model: nn.Module) -> None:
    x = inputs_of(model, "mlp.down_proj")
    streams = streams_of(model)
    down = model.model.layers[0].mlp.down_proj
    _, inputs, _ = streams.run_dense({"down": down}, keep_inputs=True)
    moments = streams.moments(down, inputs["down"], 24, constant=True)
    gram, drift = (part.double() for part in moments.moments())
    assert moments.tokens == len(x) and gram.shape == (25, 25)
    torch.testing.assert_close(gram[:-1, :-1], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gram[-1, :-1], x.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gram[:, -1], gram[-1])
    assert float(gram[-1, -1]) == pytest.approx(1) and not drift.any()


def test_a_drift_of_means_shows_beside_the_constant(model: nn.Module) -> None:
    streams = streams_of(model)
    layer = model.model.layers[0]
    _, inputs, _ = streams.run_dense({"down": layer.mlp.down_proj}, keep_inputs=True)
    dense = torch.cat([x.flatten(0, 1) for x in inputs["down"].values()])
    with torch.no_grad():
        layer.self_attn.v_proj.weight.mul_(3)
    changed = inputs_of(model, "mlp.down_proj")
    moments = streams.moments(layer.mlp.down_proj, inputs["down"], 24, constant=True)
    _, drift = moments.moments()
    torch.testing.assert_close(
        drift[:-1, -1].double(), (dense - changed).mean(0), rtol=1e-4, atol=1e-6
    )
    assert not drift[-1].any()  # the constant is in both models what it is


@pytest.mark.parametrize("unsettled", [False, True])
def test_a_part_goes_on_with_what_the_smaller_module_reads(
    model: nn.Module, unsettled: bool
) -> None:
    """After a removal attention is as settled as before, whatever came before its last Linear."""
    streams = streams_of(model)
    layer = model.model.layers[0]
    attention, down = layer.self_attn, layer.mlp.down_proj
    here = {"o": attention.o_proj, "down": down}
    _, inputs, _ = streams.run_dense(here, keep_inputs=True)
    streams.moments(attention.o_proj, inputs["o"], 16)
    left = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])  # the first group of heads
    plain = copy.deepcopy(model)
    with torch.no_grad():
        plain.model.layers[0].self_attn.o_proj.weight[:, 8:] = 0
    wanted = inputs_of(plain, "mlp.down_proj")
    made = nn.Linear(8, 16, bias=False)
    made.weight = nn.Parameter(attention.o_proj.weight.detach()[:, left].clone())
    old, attention.o_proj = attention.o_proj, made
    for name, size in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
        linear = getattr(attention, name)
        linear.weight = nn.Parameter(linear.weight.detach()[:size].clone())
    streams.shrunk(old, made, left)
    if unsettled:
        streams.unsettle()
    with calls({"q": attention.q_proj, "o": made}) as counted:
        moments = streams.moments(down, inputs["down"], 24)
    gram, _ = moments.moments()
    expected = wanted.T @ wanted / len(wanted)
    torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-6)
    assert counted == {"o": BATCHES} | ({"q": BATCHES} if unsettled else {})


def test_the_end_of_another_part_stays(model: nn.Module) -> None:
    streams = streams_of(model)
    layer = model.model.layers[0]
    streams.run_dense({}, keep_inputs=False)
    before = [end.module for end in streams._ends]
    assert before == [layer.self_attn.o_proj, layer.mlp.down_proj]
    new = nn.Linear(8, 16, bias=False)
    streams.shrunk(layer.mlp.down_proj, new, torch.arange(8))
    assert [end.module for end in streams._ends] == [before[0], new]
    streams.shrunk(layer.mlp.up_proj, nn.Linear(16, 8), torch.arange(8))
    assert [end.module for end in streams._ends] == [before[0], new]


def test_grams_are_those_of_the_compressed_stream(model: nn.Module) -> None:
    streams = streams_of(model)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.v_proj.weight.mul_(3)
    unread = nn.Linear(16, 16)
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    modules = {name: layer.get_submodule(name) for name in names}
    layer.mlp.unread = unread
    grams = streams.grams(modules | {"unread": unread})
    assert grams.keys() == set(names)
    for name in names:
        x = inputs_of(model, name)
        torch.testing.assert_close(grams[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert not any(m._forward_pre_hooks for m in layer.modules())


def test_padding_counts_in_no_moment(model: nn.Module) -> None:
    mask = torch.tensor([[1] * 6 + [0] * 4, [1] * 10])
    batches = [batch | {"attention_mask": mask} for batch in calibration()]
    streams = LayerStreams(model, list(model.model.layers), batches, torch.device("cpu"))
    down = model.model.layers[0].mlp.down_proj
    _, inputs, _ = streams.run_dense({"down": down}, keep_inputs=True)
    x = torch.cat([each[mask.bool()] for each in inputs["down"].values()]).double()
    expected = x.T @ x / len(x)
    moments = streams.moments(down, inputs["down"], 24, constant=True)
    assert moments.tokens == 16 * BATCHES
    for gram in (streams.grams({"down": down})["down"], moments.moments()[0][:-1, :-1]):
        torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-6)


def test_blocks_of_convolutions_run_by_themselves(
    small_resnet: Callable[..., Any], images: list[dict[str, torch.Tensor]]
) -> None:
    model = small_resnet(0)
    blocks = [b for stage in model.resnet.encoder.stages for b in stage.layers]
    with torch.no_grad():
        wanted = [model.resnet(**batch).last_hidden_state for batch in images]
    streams = LayerStreams(model, blocks, images, torch.device("cpu"))
    for block in blocks:
        convolutions = {n: m for n, m in block.named_modules() if isinstance(m, nn.Conv2d)}
        outputs, inputs, groups = streams.run_dense(convolutions, keep_inputs=True)
        assert sorted(groups) == sorted([name] for name in convolutions)
        for name, module in convolutions.items():
            channels = module.in_channels * module.weight[0, 0].numel()
            gram, drift = streams.moments(module, inputs[name], channels).moments()
            x = torch.cat(list(inputs[name].values()))
            unfolded = nn.functional.unfold(
                x, module.kernel_size, padding=module.padding, stride=module.stride
            )
            rows = unfolded.mT.reshape(-1, channels)
            torch.testing.assert_close(gram, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)
            assert not drift.any()
        streams.advance(outputs, changed=False)
    for batch, hidden in zip(streams.batches, wanted, strict=True):
        torch.testing.assert_close(batch.dense, hidden)


def test_a_model_may_be_one_layer_as_a_whole(
    small_resnet: Callable[..., Any], images: list[dict[str, torch.Tensor]]
) -> None:
    model = small_resnet(0)
    streams = LayerStreams(model, [model], images, torch.device("cpu"))
    outputs, _, groups = streams.run_dense(
        {"stem": model.resnet.embedder.embedder.convolution}, keep_inputs=False
    )
    assert groups == [["stem"]]
    with torch.no_grad():
        for batch, out in zip(images, outputs, strict=True):
            torch.testing.assert_close(out, model(**batch).logits)
    moments = streams.moments(
        model.resnet.encoder.stages[1].layers[0].layer[0].convolution, {}, 72, constant=True
    )
    assert moments.features == 73 and float(moments.moments()[0][-1, -1]) == pytest.approx(1.0)
