"""The neurons of an MLP stand in the order in which its row IDs compute them; nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from support import Compress
from torch import nn
from transformers import AutoModelForCausalLM

from cur_modifier.forms.base import FactoredLinear
from cur_modifier.forms.cur import CURLinear
from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.modifiers.cur.candidates import find_candidates
from cur_modifier.passes.context import trial
from cur_modifier.structure.layers import decoder_layers
from cur_modifier.structure.neurons import Neurons, find_neurons, put_in_order

ALL = "re:.*(q|k|v|o|gate|up|down|gate_up)_proj$"
MLP = "re:.*mlp.*_proj$"
ID = {"targets": [ALL], "form": "id", "rank": {"ratio": 0.6}, "layers": {"select": [2, 5]}}
PROMPT = torch.arange(100, 148)[None]


def answer(model: Any, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model.base_model(input_ids=prompt).last_hidden_state


def found_in(model: nn.Module, *targets: str) -> list[Neurons]:
    layers = decoder_layers(model)
    candidates = find_candidates(model, layers, range(len(layers)), targets or [".*_proj$"], [])
    held = [layers[index][0] for index in sorted({c.layer for c in candidates})]
    with trial(model) as run:
        return find_neurons(model, held, {c.name for c in candidates}, run)


def ordered(model: nn.Module, found: list[Neurons]) -> int:
    with trial(model) as run:
        return put_in_order(model, found, run)


def is_straight(order: torch.Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), dtype=order.dtype))


@pytest.mark.parametrize(
    ("name", "targets", "producers", "consumer"),
    [
        ("llama", [ALL], ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        ("qwen3", [ALL], ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        ("mistral", ["re:.*up_proj$"], ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        ("gemma3", [ALL], ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        ("opt", ["re:.*fc[12]$", "re:.*_proj$"], ("fc1",), "fc2"),
    ],
)
def test_found_in_every_layer_by_trying(
    name: str, targets: list[str], producers: tuple[str, ...], consumer: str
) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    wanted = [
        Neurons(layer, tuple(f"{layer}.{p}" for p in producers), f"{layer}.{consumer}")
        for layer, _ in decoder_layers(model)
    ]
    assert found_in(model, *targets) == wanted


@pytest.mark.parametrize("name", ["phi3", "qwen3_moe"])
def test_not_found_where_they_are_not_free(name: str) -> None:
    """Gate and up in one Linear; experts that a few tokens may not reach, fused or routed."""
    torch.manual_seed(0)
    assert found_in(ARCHITECTURES[name](), ALL) == []


def test_attention_is_not_taken_for_neurons(tiny: Any) -> None:
    """With as many key and value heads as query heads, v has as many outputs as o has inputs."""
    config = type(tiny.config)(**{**tiny.config.to_dict(), "num_key_value_heads": 4})
    torch.manual_seed(0)
    model = type(tiny)(config)
    assert {n.consumer.rpartition(".")[2] for n in found_in(model, ALL)} == {"down_proj"}


def test_a_second_reader_keeps_them_where_they_are(tiny: Any) -> None:
    class Nosy(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
            return self.mlp.down_proj(y) + y[..., :1]

    layer = tiny.model.layers[3]
    layer.mlp = Nosy(layer.mlp)
    assert all("layers.3." not in each.layer + "." for each in found_in(tiny, ALL))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"anchor": 0.25},
        {"fit": "weight"},
        {"fit": "loss", "anchor": 0.25, "rank": {"ratio": 0.6, "budget": "sensitivity"}},
        {"targets": ["re:.*gate_proj$"]},
        {"targets": ["re:.*(up|down)_proj$"]},
    ],
    ids=["plain", "anchored", "weight", "budget", "gate", "up-and-down"],
)
def test_served_order_is_free_and_nothing_changes(
    tiny: Any, compress: Compress, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    seen: list[torch.Tensor] = []

    def watched(model: Any, found: list[Neurons], run: Callable[[], None]) -> int:
        seen.append(answer(model))
        done = put_in_order(model, found, run)
        seen.append(answer(model))
        assert done == len(found) == 2
        return done

    monkeypatch.setattr("cur_modifier.modifiers.cur.modifier.put_in_order", watched)
    compress(tiny, ID | settings)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    for name, module in tiny.named_modules():
        if isinstance(module, RowIDLinear):
            produces = name.endswith(("gate_proj", "up_proj"))
            assert is_straight(module.order) == produces, name


def test_saved_in_order(tiny: Any, compress: Compress, tmp_path: Path) -> None:
    compress(tiny, ID)
    tiny.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(answer(loaded), answer(tiny))
    assert is_straight(loaded.model.layers[2].mlp.up_proj.order)


def test_what_was_kept_to_learn_from_follows(tiny: Any, compress: Compress) -> None:
    """Healing compares with the dense model: with its own teachers it must be that model."""
    dense = answer(tiny)
    seen: list[torch.Tensor] = []

    def teach(model: Any, containers: Any) -> None:
        for container in containers:
            container._stand_in = container._teacher
        seen.append(answer(model))
        for container in containers:
            container._stand_in = []

    def watched(model: Any, found: list[Neurons], run: Callable[[], None]) -> int:
        containers = [m for m in model.modules() if isinstance(m, FactoredLinear)]
        done = put_in_order(model, found, run)
        teach(model, containers)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cur_modifier.modifiers.cur.modifier.put_in_order", watched)
        heal = {"steps": 2, "warmup_steps": 1, "batch_size": 2, "mlflow": False}
        compress(tiny, ID, {"CURHealModifier": heal})
    torch.testing.assert_close(seen[0], dense, rtol=1e-4, atol=1e-4)


def test_a_cur_stage_before_keeps_its_columns_real(tiny: Any, compress: Compress) -> None:
    """down as CUR first, then gate and up as row IDs, which turn its inputs around."""
    down = tiny.model.layers[2].mlp.down_proj.weight.detach().clone()
    cur = {"targets": ["re:.*down_proj$"], "rank": {"fixed": 32}, "layers": {"select": [2]}}
    first = {"CURModifier": {"mlflow": False, **cur}}
    rest = ID | {"targets": ["re:.*(gate|up)_proj$"], "layers": {"select": [2]}}
    compress(tiny, rest, recipe_first=first)
    module = tiny.model.layers[2].mlp.down_proj
    assert isinstance(module, CURLinear)
    assert is_straight(tiny.model.layers[2].mlp.gate_proj.order)
    # Columns of the dense weight as the neurons stand now: C's are among them, in its order.
    places = [int((down - c[:, None]).abs().sum(0).argmin()) for c in module.cur_c.weight.T]
    assert torch.equal(down[:, places], module.cur_c.weight)
    rows = down[module.rows.long()]
    order = [int((rows - r[:, None]).abs().sum(0).argmin()) for r in module.cur_r.weight.T]
    assert order != sorted(order)
    assert [order[c] for c in module.columns.tolist()] == places


def test_a_stage_behind_finds_the_dense_weight_in_order(tiny: Any, compress: Compress) -> None:
    """gate and up first, then down, whose dense layer answers until it is fitted."""
    common = {"mlflow": False, "layers": {"select": [2]}, "form": "id"}
    pair = {"targets": ["re:.*(gate|up)_proj$"], "rank": {"fixed": 256}}  # of 256 inputs: exact
    dense = answer(tiny)
    down = {"targets": ["re:.*down_proj$"], "rank": {"fixed": 255}}
    compress(tiny, common | down, recipe_first={"CURModifier": common | pair})
    assert is_straight(tiny.model.layers[2].mlp.up_proj.order)
    assert (answer(tiny) - dense).norm() < 0.01 * dense.norm()


def test_a_norm_that_learned_keeps_them_where_they_are(tiny: Any) -> None:
    """A norm of ones between producers and consumer is blind to the order, a trained one is not."""

    class Normed(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.mlp = mlp
            self.norm = nn.RMSNorm(mlp.down_proj.in_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
            return self.mlp.down_proj(self.norm(y))

    layer = tiny.model.layers[3]
    layer.mlp = Normed(layer.mlp)
    [found] = [n for n in found_in(tiny, ALL) if n.layer.endswith(".3")]
    gate = layer.mlp.mlp.gate_proj
    factored = RowIDLinear(gate.in_features, gate.out_features, 8, device="cpu")
    factored.order.copy_(torch.randperm(gate.out_features))
    with torch.no_grad():
        for parameter in factored.parameters():
            parameter.normal_(std=0.1)
        layer.mlp.norm.weight.uniform_(0.5, 2)
    layer.mlp.mlp.gate_proj = factored
    assert ordered(tiny, [found]) == 0
    nn.init.ones_(layer.mlp.norm.weight)
    before = answer(tiny)
    assert ordered(tiny, [found]) == 1
    torch.testing.assert_close(answer(tiny), before, rtol=1e-4, atol=1e-4)
    assert ordered(tiny, [found]) == 0  # nothing is left to do
