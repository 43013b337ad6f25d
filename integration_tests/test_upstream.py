"""Fails when llm-compressor, compressed-tensors or transformers change what we rely on unasked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.recipe import Recipe
from support import NO_PROCESSOR, SPARSE_2_4, W4A16, Compress
from transformers import AutoConfig

from cur_modifier.checkpoint import save
from cur_modifier.checkpoint.save import TRIPWIRE
from cur_modifier.modifiers import upstream

CUR = {"rank": {"fixed": 32}, "layers": {"select": [4, 5]}}


@pytest.mark.parametrize("then", [W4A16, SPARSE_2_4], ids=["gptq", "sparsegpt"])
def test_losses_of_followers_are_read_from_the_log(
    tiny: Any, compress: Compress, then: dict[str, Any]
) -> None:
    losses = upstream.FollowerLosses()
    compress(tiny, CUR, then)
    losses.close()
    expected = {
        f"model.layers.{layer}.{module}.{factor}"
        for layer in (4, 5)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")
        for factor in ("cur_r", "cur_u", "cur_c")
    }
    assert {name.strip(".") for name in losses.by_module} == expected
    assert all(loss >= 0 for loss in losses.by_module.values())


def test_group_sizes_of_presets_and_groups() -> None:
    factor = torch.nn.Linear(64, 64)
    preset = GPTQModifier(scheme="W4A16", targets=["Linear"], ignore=["lm_head"])
    grouped = GPTQModifier(**W4A16["GPTQModifier"])
    assert upstream.group_sizes(preset, "a.q_proj.cur_c", factor) == [128]
    assert upstream.group_sizes(preset, "lm_head", factor) == []
    assert upstream.group_sizes(grouped, "a.q_proj.cur_c", factor) == [32]
    assert upstream.group_sizes(grouped, "a.q_proj", factor) == []


def test_sparsity_block() -> None:
    assert upstream.prune_block(SparseGPTModifier(sparsity=0.5, mask_structure="2:4")) == 4
    assert upstream.prune_block(SparseGPTModifier(sparsity=0.5)) == 0


def test_save_pretrained_is_wrapped_before_the_stage(tiny: Any, compress: Compress) -> None:
    compress(tiny, CUR)
    assert tiny.save_pretrained.brought
    # llm-compressor's own wrapper lies below ours and must not be applied again above it
    assert tiny.save_pretrained._overridden


def test_a_recipe_of_two_stages_is_kept_whole(tiny: Any, tiny_data: Dataset) -> None:
    """Both have a group of one name; what is kept makes the same model again."""
    cur = {"mlflow": False, "rank": {"fixed": 16}, "layers": {"select": "last", "count": 1}}
    stages = {
        f"{name}_stage": {"cur_modifiers": {"CURModifier": {**cur, "targets": [f"re:.*{name}$"]}}}
        for name in ("q_proj", "down_proj")
    }
    recipe = yaml.safe_dump(stages, sort_keys=False)
    oneshot(model=tiny, dataset=tiny_data, processor=NO_PROCESSOR, recipe=recipe)
    files = save._numbered(tiny.save_pretrained.brought)
    kept = yaml.safe_load(files["recipe_as_given.yaml"])
    [groups] = kept.values()
    assert [group["CURModifier"]["targets"] for group in groups.values()] == [
        ["re:.*q_proj$"],
        ["re:.*down_proj$"],
    ]
    assert {"report.html", "report-2.html"} < {*files} and "recipe_as_given-2.yaml" not in files
    assert len(Recipe.create_instance(yaml.safe_dump(kept)).modifiers) == 2


def test_transformers_honours_the_tripwire(tiny_checkpoint: Any, tmp_path: Any) -> None:
    from transformers import LlamaForCausalLM

    config = AutoConfig.from_pretrained(tiny_checkpoint)
    config.transformers_weights = TRIPWIRE
    with pytest.raises(OSError, match="needs-import-cur_modifier"):
        LlamaForCausalLM.from_pretrained(tiny_checkpoint, config=config)
