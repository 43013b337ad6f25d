"""How heads may lie in projections: every layout that fits the sizes, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, LlavaConfig, MambaConfig

pytest.importorskip("llmcompressor")

from cur_modifier.structure.heads import head_layouts

GROUPS, QUERIES, WIDTHS = st.integers(1, 6), st.integers(1, 4), st.integers(1, 5)


def config_of(groups: int, queries: int, **fields: Any) -> LlamaConfig:
    heads = groups * queries
    given: dict[str, Any] = {"hidden_size": 8 * heads, "num_attention_heads": heads}
    return LlamaConfig(**given | {"num_key_value_heads": groups} | fields)


def rows(features: torch.Tensor) -> list[int]:
    return sorted(features.flatten().tolist())


@given(GROUPS, QUERIES, WIDTHS)
def test_projections_by_themselves_hold_blocks(groups: int, queries: int, width: int) -> None:
    q, kv = groups * queries * width, groups * width
    [layout] = head_layouts(config_of(groups, queries), [q, kv, kv], q)
    assert torch.equal(layout.inputs, torch.arange(q).view(groups, queries * width))
    assert torch.equal(layout.outputs[0], layout.inputs)
    for part in layout.outputs[1:]:
        assert torch.equal(part, torch.arange(kv).view(groups, width))


@given(GROUPS, QUERIES, WIDTHS)
def test_a_fused_projection_holds_them_one_after_another_or_by_group(
    groups: int, queries: int, width: int
) -> None:
    q, kv = groups * queries * width, groups * width
    apart, together = head_layouts(config_of(groups, queries), [q + 2 * kv], q)
    for layout in (apart, together):
        [part] = layout.outputs
        assert part.shape == (groups, (queries + 2) * width)
        assert rows(part) == list(range(q + 2 * kv))
        assert torch.equal(layout.inputs, torch.arange(q).view(groups, -1))
    [part] = apart.outputs
    assert torch.equal(part[:, : queries * width], torch.arange(q).view(groups, -1))
    assert torch.equal(part[:, -2 * width : -width], q + torch.arange(kv).view(groups, -1))
    assert torch.equal(part[:, -width:], q + kv + torch.arange(kv).view(groups, -1))
    [part] = together.outputs
    assert bool((part.diff(dim=1) == 1).all())  # a group has everything side by side


@given(GROUPS, QUERIES, WIDTHS, st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_other_sizes_fit_no_layout(
    groups: int, queries: int, width: int, outputs: list[int]
) -> None:
    q, kv = groups * queries * width, groups * width
    found = list(head_layouts(config_of(groups, queries), outputs, q))
    assert bool(found) is (outputs in ([q, kv, kv], [q + 2 * kv]))


def test_a_config_that_counts_no_groups_has_a_key_for_every_query() -> None:
    [apart, together] = head_layouts(GPT2Config(n_embd=12, n_head=3), [36], 12)
    assert rows(apart.outputs[0][1]) == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]
    assert rows(together.outputs[0][1]) == list(range(12, 24))


def test_heads_are_those_of_the_text_model() -> None:
    whole = LlavaConfig(text_config=config_of(2, 2))
    [layout] = head_layouts(whole, [16, 8, 8], 16)
    assert len(layout.inputs) == 2


@pytest.mark.parametrize(
    ("heads", "groups", "inputs"),
    [(0, None, 12), (4, 3, 12), (5, 5, 12)],
    ids=["no heads", "groups of unlike size", "inputs that heads can't share"],
)
def test_a_config_that_does_not_go_together_has_no_layout(
    heads: int, groups: int | None, inputs: int
) -> None:
    config = config_of(2, 2)
    config.num_attention_heads, config.num_key_value_heads = heads, groups
    for outputs in ([inputs] * 3, [3 * inputs]):
        assert list(head_layouts(config, outputs, inputs)) == []


def test_a_model_without_attention_has_none() -> None:
    assert list(head_layouts(MambaConfig(), [12, 12, 12], 12)) == []
