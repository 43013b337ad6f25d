"""Heads of attention, found by trying."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

pytest.importorskip("llmcompressor")

from cur_modifier.passes.context import trial
from cur_modifier.structure.heads import Heads, block_order, find_heads
from cur_modifier.structure.layers import decoder_layers

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def found_in(model: Any) -> list[Heads]:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)  # or heads attend alike, whichever they are
    with trial(model) as run:
        return find_heads(model, [name for name, _ in decoder_layers(model)], run)


@pytest.mark.parametrize(
    ("build", "groups", "output"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)), 2, "o_proj"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 4})), 4, "o_proj"),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)), 2, "o_proj"),
        (
            lambda: OPTForCausalLM(
                OPTConfig(
                    vocab_size=64,
                    hidden_size=32,
                    ffn_dim=32,  # as wide as attention: its neurons are no heads all the same
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    word_embed_proj_dim=32,
                )
            ),
            4,
            "out_proj",
        ),
    ],
    ids=["grouped", "as many keys as queries", "normalized", "OPT"],
)
def test_every_layer_has_its_heads(build: Any, groups: int, output: str) -> None:
    torch.manual_seed(0)
    found = found_in(build())
    assert len(found) == 2
    for each in found:
        assert each.groups == groups and each.consumer.endswith(output)
        assert [name.rpartition(".")[2][0] for name in sorted(each.producers)] == ["k", "q", "v"]


def test_what_is_fused_is_not_found() -> None:
    torch.manual_seed(0)
    assert found_in(Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0))) == []


def test_one_group_has_no_order() -> None:
    torch.manual_seed(0)
    assert found_in(LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 1}))) == []


@given(st.permutations(range(4)), st.integers(1, 5))
def test_blocks_move_whole(blocks: list[int], size: int) -> None:
    order = block_order(torch.tensor(blocks), 4 * size)
    assert order.view(4, size).tolist() == [
        list(range(block * size, (block + 1) * size)) for block in blocks
    ]
