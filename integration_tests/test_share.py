"""A stage whose row IDs share skeletons: q, k and v as one, gate and up as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from datasets import Dataset
from support import W4A16, Compress
from torch import nn
from transformers import AutoModelForCausalLM

from cur_modifier.forms.base import FactoredLinear
from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.forms.sizes import FORMS
from cur_modifier.linalg import gram_norm
from cur_modifier.modifiers.cur.candidates import find_candidates, joined
from cur_modifier.modifiers.report import parameter_count
from cur_modifier.passes.context import trial
from cur_modifier.passes.sensitivity import measure
from cur_modifier.structure.layers import decoder_layers

SHARED = {
    "targets": ["re:.*(q|k|v|o|gate|up|down)_proj$"],
    "form": "id",
    "share_skeleton": True,
    "rank": {"ratio": 0.6},
    "multiple_of": 32,
    "layers": {"select": [2, 5]},
}
EVERYTHING = {
    "fit": "loss",
    "anchor": 0.3,
    "refine": {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3},
    "rank": {"ratio": 0.6, "budget": "sensitivity"},
}
PROMPT = torch.arange(100, 148)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUR_MODIFIER_CACHE", str(tmp_path / "cache"))


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def groups(model: nn.Module) -> dict[str, list[RowIDLinear]]:
    """The modules that share a skeleton, by the name of the one that holds it."""
    factored = {n: m for n, m in model.named_modules() if isinstance(m, RowIDLinear)}
    found = {n: [m] for n, m in factored.items() if m.leader is None}
    for module in factored.values():
        if module.leader is not None:
            found[next(n for n, m in factored.items() if m is module.leader)].append(module)
    return found


def dense_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)
    }


def projections(model: nn.Module, *layers: int) -> int:
    """Parameters below the projections of these layers."""
    return sum(
        p.numel()
        for n, p in model.named_parameters()
        if "_proj" in n and any(f"layers.{layer}." in n for layer in layers)
    )


def test_modules_that_read_one_tensor_share(tiny: Any, compress: Compress) -> None:
    biases = {n: p.detach().clone() for n, p in tiny.named_parameters() if n.endswith("bias")}
    before = projections(tiny, 2, 5)
    compress(tiny, SHARED)
    found = groups(tiny)
    layer = "model.layers.5"
    assert {n: len(g) for n, g in found.items() if layer in n} == {
        f"{layer}.self_attn.q_proj": 3,
        f"{layer}.self_attn.o_proj": 1,
        f"{layer}.mlp.gate_proj": 2,
        f"{layer}.mlp.down_proj": 1,
    }
    for members in found.values():
        m, n, rank = sum(g.out_features for g in members), members[0].in_features, members[0].rank
        room = 0.6 * m * n
        assert FORMS["id"].parameters(m, n, rank) <= room
        assert FORMS["id"].parameters(m, n, rank + 32) > room
        assert sum(g.direct_outputs for g in members) == rank
        assert all(g.direct_outputs % 32 == 0 for g in members)
    assert 0.5 * before < projections(tiny, 2, 5) <= 0.6 * before + sum(map(len, biases.values()))
    after = dict(tiny.named_parameters())
    assert all(torch.equal(after[n], bias) for n, bias in biases.items())


def test_without_activations_the_product_is_the_truncated_svd(
    tiny: Any, compress: Compress
) -> None:
    weights = dense_weights(tiny)
    compress(tiny, SHARED | {"fit": "weight", "multiple_of": 1}, dataset=None)
    for block, names in {"self_attn": "qkv", "mlp": ("gate", "up")}.items():
        prefix = f"model.layers.2.{block}"
        modules = [tiny.get_submodule(f"{prefix}.{name}_proj") for name in names]
        W = torch.cat([weights[f"{prefix}.{name}_proj"] for name in names])
        product = torch.cat([module.dense_weight() for module in modules])
        tail = float(torch.linalg.vector_norm(torch.linalg.svdvals(W)[modules[0].rank :]))
        assert gram_norm(W - product) == pytest.approx(tail, rel=1e-4)


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["gram", "everything"])
@pytest.mark.parametrize("then", [None, W4A16], ids=["alone", "W4A16"])
def test_saved_and_loaded(
    tiny: Any, compress: Compress, tmp_path: Path, more: dict[str, Any], then: Any
) -> None:
    compress(tiny, SHARED | more, then)
    assert any(len(members) > 1 for members in groups(tiny).values())
    before = answer(tiny)
    assert bool(torch.isfinite(before).all())
    tiny.save_pretrained(tmp_path / "out", save_compressed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert groups(loaded).keys() == groups(tiny).keys()
    assert torch.equal(answer(loaded), before)
    if then:
        scheme = [
            hasattr(m, "quantization_scheme") for n, m in loaded.named_modules() if "id_" in n
        ]
        assert scheme and all(scheme)


def test_the_log_counts_what_is_stored(tiny: Any, compress: Compress, log: list[str]) -> None:
    dense = parameter_count(tiny)
    compress(tiny, SHARED | {"mlflow": True})
    stored = parameter_count(tiny)
    [table] = [line for line in log if line.startswith("CURModifier\n")]
    assert f"({dense:,} → {stored:,})" in table and "14 modules factored" in table
    [line] = [line for line in log if line.startswith("model.layers.2.self_attn.k_proj: ")]
    assert "on the skeleton of model.layers.2.self_attn.q_proj" in line


def test_the_same_seed_gives_the_same_factors(tiny_checkpoint: Path, compress: Compress) -> None:
    states = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        compress(model, SHARED | {"anchor": 0.5, "fit": "loss"})
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_both_routes_fit_the_same(tiny_checkpoint: Path, compress: Compress) -> None:
    """With no share of the dense model's inputs, the stage's own passes are upstream's."""
    found = []
    for more in ({}, {"anchor": 0.0}):
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        compress(model, SHARED | more)
        found.append(answer(model))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.1


def test_a_budget_buys_ranks_of_groups(tiny: Any, compress: Compress) -> None:
    before = projections(tiny, *range(13))
    every = {"layers": {"select": "all"}, "rank": EVERYTHING["rank"], "multiple_of": 8}
    compress(tiny, SHARED | every)
    assert 0.57 * before < projections(tiny, *range(13)) < 0.61 * before
    assert len({members[0].rank for members in groups(tiny).values()}) > 3


def test_shared_factors_are_healed(tiny_checkpoint: Path, compress: Compress) -> None:
    """T of every member learns; the skeleton stays."""
    states = []
    for then in (
        None,
        {"CURHealModifier": {"steps": 8, "warmup_steps": 1, "validate_every": 4, "mlflow": False}},
    ):
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        compress(model, SHARED | {"fit": "weight"}, then)
        states.append({k: v for k, v in model.state_dict().items() if ".id_" in k})
    before, after = states
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if "id_t" in k}


def test_only_targets_share(tiny: Any, compress: Compress) -> None:
    compress(tiny, SHARED | {"targets": ["re:.*(q|v|up)_proj$"]})
    found = {n: len(g) for n, g in groups(tiny).items() if "layers.2." in n}
    assert found == {"model.layers.2.self_attn.q_proj": 2, "model.layers.2.mlp.up_proj": 1}
    assert isinstance(tiny.model.layers[2].self_attn.k_proj, nn.Linear)


def test_nothing_to_share_is_said(tiny: Any, compress: Compress, log: list[str]) -> None:
    compress(tiny, SHARED | {"targets": ["re:.*(o|up)_proj$"]})
    assert any("share_skeleton changes nothing" in line for line in log)
    assert all(len(members) == 1 for members in groups(tiny).values())


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"share_skeleton": True}, "share_skeleton is set with form 'cur'"),
        (SHARED | {"selection": "qdeim"}, "share_skeleton is set with selection 'qdeim'"),
        (SHARED | {"rank": {"fixed": 320}}, r"self_attn.q_proj\+k_proj\+v_proj: rank 320 is above"),
        (SHARED | {"rank": {"ratio": 0.01}}, r"q_proj\+k_proj\+v_proj: ratio 0.01"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tiny: Any, compress: Compress, stage: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        compress(tiny, stage)
    assert not any(isinstance(m, FactoredLinear) for m in tiny.modules())


def test_a_group_size_that_does_not_divide_the_shared_rank_is_refused(
    tiny: Any, compress: Compress
) -> None:
    with pytest.raises(ValueError, match=r"v_proj.id_t: \d+ inputs, group_size 32"):
        compress(tiny, SHARED | {"multiple_of": 1, "rank": {"fixed": 99}}, W4A16)


def test_the_metric_of_a_group_is_that_of_its_stacked_outputs(
    tiny: Any, tiny_data: Dataset
) -> None:
    attention = tiny.model.layers[1].self_attn
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    batch = {"input_ids": torch.tensor(tiny_data["input_ids"][:2])}
    alone = measure(tiny, {str(i): [m] for i, m in enumerate(qkv)}, [], [batch], seed=0)
    joint = measure(tiny, {"qkv": qkv}, [], [batch], seed=0).outputs["qkv"].float()
    start = 0
    for index, module in enumerate(qkv):
        own = slice(start, start + module.out_features)
        torch.testing.assert_close(joint[own, own], alone.outputs[str(index)].float())
        start += module.out_features
    torch.testing.assert_close(joint, joint.T)
    assert float(joint[:256, 256:].abs().max()) > 0


# Who reads one tensor


def names(model: nn.Module) -> list[list[str]]:
    layers = decoder_layers(model)
    candidates = find_candidates(model, layers, [0], ["Linear"], [])
    prefix = f"{layers[0][0]}."
    with trial(model) as run:
        groups = joined(model, layers, candidates, run)
    return [[n.removeprefix(prefix) for n in c.members] for c in groups]


class Routed(nn.Module):
    """A shared expert and two others, to which tokens are routed, some or all of them."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.shared = mlp
        self.experts = nn.ModuleList(type(mlp)(mlp.config) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(x) + self.experts[0](x)


def test_experts_do_not_share(tiny: Any) -> None:
    tiny.model.layers[0].mlp = Routed(tiny.model.layers[0].mlp)
    found = names(tiny)
    assert ["mlp.shared.gate_proj", "mlp.shared.up_proj"] in found
    assert all(len(group) == 1 for group in found if "experts" in group[0])
    assert sum("experts" in group[0] for group in found) == 6


@pytest.mark.parametrize("name", ["phi3", "opt", "qwen3", "gemma3", "qwen3_moe"])
def test_groups_are_found_by_what_is_read(name: str) -> None:
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    wanted = {
        "phi3": [],
        "opt": [qkv],
        "qwen3_moe": [qkv],
    }.get(name, [qkv, ["mlp.gate_proj", "mlp.up_proj"]])
    assert [sorted(g) for g in names(build(name)) if len(g) > 1] == [sorted(g) for g in wanted]
