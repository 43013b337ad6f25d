"""The modules that a stage factors, alone or together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import FORMS, Shape
from cur_modifier.modifiers.cur.candidates import (
    Candidate,
    find_candidates,
    joined,
    with_direct_outputs,
)
from cur_modifier.passes.context import trial
from cur_modifier.structure.layers import decoder_layers


@pytest.mark.parametrize("form", FORMS)
def test_factors_lie_where_the_weights_do(offloaded_llama: nn.Module, form: str) -> None:
    linear = offloaded_llama.model.layers[0].self_attn.q_proj
    [factored] = (
        Candidate(members={"q": linear}, layer=0, rank=4).empty_modules(find_form(form)).values()
    )
    assert {p.device.type for p in factored.parameters()} == {"cpu"}


Q, K, GATE, UP = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")


def find(model: Any, targets: list[str], allowed: Any = (0, 1, 2), ignore: Any = ()) -> Any:
    return find_candidates(model, decoder_layers(model), allowed, targets, list(ignore))


def together(model: Any, targets: list[str]) -> list[Candidate]:
    with trial(model) as run:
        return joined(model, decoder_layers(model), find(model, targets), run)


def test_targets_are_found_in_the_allowed_layers(model: Any) -> None:
    found = find(model, ["re:.*q_proj$", "re:.*up_proj$"], allowed=[2, 0], ignore=["re:.*2.*up"])
    assert [c.name for c in found] == [
        f"model.layers.0.{Q}",
        f"model.layers.0.{UP}",
        f"model.layers.2.{Q}",
    ]
    assert [c.layer for c in found] == [0, 0, 2]
    assert all(c.rank is None and not c.shared and c.blocks is None for c in found)


def test_a_target_that_matches_nothing_names_what_there_is(model: Any) -> None:
    with pytest.raises(ValueError, match=r"target 'query' matches no Linear.*q_proj.*'re:"):
        find(model, ["re:.*q_proj$", "query"])
    with pytest.raises(ValueError, match=r"target 'lm_head' matches no Linear inside"):
        find(model, ["lm_head"])
    with pytest.raises(ValueError, match=r"nothing is left to factor.*ignore \['re:\.\*q_proj"):
        find(model, ["re:.*q_proj$"], ignore=["re:.*q_proj$"])


def test_modules_of_earlier_stages_are_refused(model: Any) -> None:
    linear = model.model.layers[0].self_attn.q_proj
    linear.quantization_scheme = object()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is already quantized"):
        find(model, ["re:.*q_proj$"])
    del linear.quantization_scheme
    factored = find_form("id").build(Shape(16, 16, 4), bias=False)
    model.model.layers[0].self_attn.q_proj = factored
    with pytest.raises(ValueError, match=r"is already factored by an earlier"):
        find(model, ["Linear"])


def test_modules_that_read_one_tensor_in_one_block_are_joined(model: Any) -> None:
    found = together(model, ["Linear"])
    names = [c.name.removeprefix(f"model.layers.{c.layer}.") for c in found]
    attention = ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj"]
    assert names == 3 * [*attention, "mlp.gate_proj+up_proj", "mlp.down_proj"]
    qkv = found[0]
    assert qkv.shared and qkv.sizes == [16, 8, 8] and qkv.shape == (32, 16) and not qkv.bias
    assert torch.equal(qkv.weight, torch.cat([m.weight for m in qkv.members.values()]))
    assert qkv.first is model.get_submodule(f"model.layers.0.{Q}")


def test_experts_stay_apart(model: Any) -> None:
    """Which of them read what is up to the routing."""
    mlp = model.model.layers[0].mlp
    experts = nn.ModuleList([nn.Linear(16, 24, bias=False) for _ in range(2)])
    whole = mlp.forward
    mlp.add_module("experts", experts)
    mlp.forward = lambda x: whole(x) + sum(0 * e(x).sum() for e in experts)
    names = [c.name for c in together(model, ["Linear"]) if c.layer == 0]
    assert {f"model.layers.0.mlp.experts.{k}" for k in range(2)} <= set(names)


@pytest.mark.parametrize("multiple_of", [1, 2])
def test_shares_of_a_skeleton_add_up_to_its_rank(model: Any, multiple_of: int) -> None:
    [candidate] = [c for c in together(model, ["re:.*(gate|up)_proj$"]) if c.layer == 0]
    assert with_direct_outputs(candidate, multiple_of, None) is candidate  # it has no rank yet
    chosen = with_direct_outputs(replace(candidate, rank=8), multiple_of, torch.eye(48))
    assert sum(chosen.direct_outputs) == 8
    assert all(c % multiple_of == 0 for c in chosen.direct_outputs)
    assert chosen.blocks == list(zip([24, 24], chosen.direct_outputs, strict=True))
    layers = chosen.empty_modules(find_form("id"))
    assert [layer.direct_outputs for layer in layers.values()] == list(chosen.direct_outputs)


def test_without_shares_they_are_in_proportion_to_the_outputs(model: Any) -> None:
    qkv = together(model, ["re:.*(q|k|v)_proj$"])[0]
    layers = replace(qkv, rank=8).empty_modules(find_form("id"), device="meta")
    assert [layer.direct_outputs for layer in layers.values()] == [4, 2, 2]
    assert all(p.is_meta for layer in layers.values() for p in layer.parameters())
