"""The plugin's quantizer in transformers' registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.quantizers import auto

import cur_modifier.transformers
from cur_modifier.checkpoint.save import wrap_save_pretrained
from cur_modifier.forms import quantizer
from cur_modifier.forms.quantizer import CURConfig, CURQuantizer
from cur_modifier.forms.quantizer import register as register_shipped
from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.linalg import interpolative
from cur_modifier.transformers import PluginQuantizer, register

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not met the quantizer."""
    for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        known = {k: v for k, v in getattr(auto, name).items() if k != "cur"}
        for module in (auto, cur_modifier.transformers, quantizer):
            monkeypatch.setattr(module, name, known, raising=False)


def test_registering_twice_is_harmless(registry: None) -> None:
    for _ in range(2):
        register()
    assert auto.AUTO_QUANTIZER_MAPPING["cur"] is PluginQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["cur"] is CURConfig


def test_the_plugin_s_comes_in_place_of_a_checkpoint_s(registry: None) -> None:
    register_shipped()
    assert auto.AUTO_QUANTIZER_MAPPING["cur"] is CURQuantizer
    register()
    register_shipped()
    assert auto.AUTO_QUANTIZER_MAPPING["cur"] is PluginQuantizer


def test_a_loaded_model_saves_itself_whole(small_llama: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = small_llama(0, num_hidden_layers=1)
    W = model.get_submodule(UP).weight.detach()
    model.set_submodule(UP, RowIDLinear.from_factors(interpolative(W, 6)))
    wrap_save_pretrained(model)
    folders = [tmp_path / name for name in ("first", "second")]
    model.save_pretrained(folders[0])
    loaded = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    assert loaded.hf_quantizer.is_serializable()
    loaded.save_pretrained(folders[1])
    first, second = ({path.relative_to(folder) for path in folder.rglob("*")} for folder in folders)
    assert first == second
    again = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded(ids).logits)
