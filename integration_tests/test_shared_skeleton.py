"""Projections that share a skeleton: calibrated, quantized, to disk, and back by every route."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import load_file
from support import NO_PROCESSOR, W4A16
from torch import nn
from transformers import AutoModelForCausalLM

from cur_modifier.checkpoint.save import wrap_save_pretrained
from cur_modifier.forms.row_id import RowIDLinear, load_shared, shared_skeleton
from cur_modifier.forms.schema import SchemaError
from cur_modifier.linalg import interpolative, split_rows

PROMPT = torch.arange(100, 148)[None]
# Each rank above the outputs of k and v, and a multiple of the quantization groups.
GROUPS = {
    ("self_attn", ("q_proj", "k_proj", "v_proj")): 160,
    ("mlp", ("up_proj", "gate_proj")): 192,
}
LAYERS = (2, 5)


def share(model: Any) -> dict[str, RowIDLinear]:
    """Factor by hand: every group of projections gets one skeleton."""
    shared = {}
    for index in LAYERS:
        layer = model.model.layers[index]
        for (block, names), rank in GROUPS.items():
            parent = layer.get_submodule(block)
            linears: list[nn.Linear] = [parent.get_submodule(name) for name in names]
            sizes = [linear.out_features for linear in linears]
            weight = torch.cat([linear.weight.detach() for linear in linears])
            parts = split_rows(interpolative(weight, rank), sizes)
            layers = shared_skeleton(
                weight.shape[1],
                sizes,
                rank,
                [part.direct_outputs for part in parts],
                bias=[linear.bias is not None for linear in linears],
            )
            load_shared(layers, parts, [linear.bias for linear in linears])
            for name, container in zip(names, layers, strict=True):
                setattr(parent, name, container)
                shared[f"model.layers.{index}.{block}.{name}"] = container
    return shared


class Saved(NamedTuple):
    """A model with shared skeletons on disk, and what it answered in memory."""

    path: Path
    logits: torch.Tensor
    quantized: bool


@pytest.fixture(scope="module", params=["as they are", "W4A16 by GPTQ"])
def saved(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tiny_data: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> Saved:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    share(model)
    quantized = request.param != "as they are"
    if quantized:
        recipe = yaml.safe_dump({"quantize_stage": {"quantization_modifiers": W4A16}})
        oneshot(model=model, dataset=tiny_data, recipe=recipe, processor=NO_PROCESSOR)
    path = tmp_path_factory.mktemp("shared") / "out"
    logits = answer(model)
    wrap_save_pretrained(model)
    model.save_pretrained(path)
    return Saved(path, logits, quantized)


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def test_the_product_of_shared_factors_is_the_best_approximation(tiny: Any) -> None:
    dense = {
        name: module.weight.detach().clone()
        for name, module in tiny.named_modules()
        if isinstance(module, nn.Linear)
    }
    shared = share(tiny)
    leader = "model.layers.2.self_attn.q_proj"
    stacked = torch.cat(
        [dense[leader.replace("q_proj", n)] for n in ("q_proj", "k_proj", "v_proj")]
    )
    found = torch.cat(
        [shared[leader.replace("q_proj", n)].dense_weight() for n in ("q_proj", "k_proj", "v_proj")]
    )
    tail = torch.linalg.svdvals(stacked)[160:]
    torch.testing.assert_close((stacked - found).norm(), tail.norm(), rtol=1e-3, atol=0)


def test_from_pretrained_equals_memory(saved: Saved) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved.path)
    attention = loaded.model.layers[2].self_attn
    assert attention.k_proj.leader is attention.v_proj.leader is attention.q_proj
    assert loaded.model.layers[5].mlp.gate_proj.leader is loaded.model.layers[5].mlp.up_proj
    assert torch.equal(answer(loaded), saved.logits)


def test_the_skeleton_is_on_disk_once(saved: Saved) -> None:
    tensors = load_file(saved.path / "model.safetensors")
    suffix = "_packed" if saved.quantized else ""
    for index in LAYERS:
        found = {
            key for key in tensors if f"layers.{index}." in key and "id_s.weight" + suffix in key
        }
        prefix = f"model.layers.{index}"
        assert {key for key in found if key.endswith(f"id_s.weight{suffix}")} == {
            f"{prefix}.self_attn.q_proj.id_s.weight{suffix}",
            f"{prefix}.mlp.up_proj.id_s.weight{suffix}",
        }
    if not saved.quantized:
        stored = sum(tensors[k].numel() for k in tensors if "layers.2.mlp" in k and ".id_" in k)
        assert stored == 192 * (1024 + 256 - 192)


def test_saved_again_and_loaded_again(saved: Saved, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved.path)
    answer(loaded)  # unpacks quantized factors; they must be packed again
    loaded.save_pretrained(tmp_path / "again", max_shard_size="1MB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(answer(again), saved.logits)
    first, second = (
        json.loads((path / "config.json").read_text())["quantization_config"]["modules"]
        for path in (saved.path, tmp_path / "again")
    )
    assert first == second


def test_remote_code_without_the_plugin(saved: Saved, tmp_path: Path) -> None:
    torch.save(saved.logits, tmp_path / "logits.pt")
    script = f"""
import sys, torch
sys.modules["cur_modifier"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved.path)!r}, trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.arange(100, 148)[None]).logits
assert torch.equal(logits, torch.load({str(tmp_path / "logits.pt")!r})), "other logits"
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_generation_computes_each_skeleton_once_a_step(saved: Saved) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved.path)
    calls: list[int] = []
    loaded.model.layers[2].self_attn.q_proj.id_s.register_forward_hook(lambda *_: calls.append(1))
    loaded.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(calls) == 4


def test_a_leader_that_is_not_there_is_named(saved: Saved, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in saved.path.iterdir():
        if file.is_file():
            (broken / file.name).symlink_to(file)
    config = json.loads((saved.path / "config.json").read_text())
    k = "model.layers.2.self_attn.k_proj"
    config["quantization_config"]["modules"][k]["shared_skeleton"] = "model.layers.3.x"
    (broken / "config.json").unlink()
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SchemaError, match=f"{k} uses the skeleton of model.layers.3.x, which is not"
    ):
        AutoModelForCausalLM.from_pretrained(broken)


def test_layers_may_become_dense_again(tiny: Any, tmp_path: Path) -> None:
    shared = share(tiny)
    wrap_save_pretrained(tiny)
    attention = tiny.model.layers[2].self_attn
    attention.q_proj = attention.q_proj.to_dense()
    with pytest.raises(ValueError, match=r"2.self_attn.k_proj uses the skeleton of a layer that"):
        tiny.save_pretrained(tmp_path / "out")
    attention.q_proj = shared["model.layers.2.self_attn.q_proj"]
    attention.k_proj, attention.v_proj = attention.k_proj.to_dense(), attention.v_proj.to_dense()
    tiny.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(answer(loaded), answer(tiny))
