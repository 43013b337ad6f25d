"""SmolLM2 through oneshot, to disk, and back by every route."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compressed_tensors.quantization import QuantizationStatus
from datasets import Dataset
from llmcompressor import oneshot
from loguru import logger
from safetensors.torch import load_file, save_file
from support import CUR, ID, SPARSE_2_4, W4A16, recipe_text
from transformers import AutoModelForCausalLM

from cur_modifier.forms.base import FactoredLinear
from cur_modifier.forms.schema import Schema, SchemaError
from cur_modifier.modifiers.report import parameter_bytes

PROMPT = torch.arange(1000, 1048)[None]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "cur": (CUR, None),
    "id": (ID, None),
    "cur-w4a16": (CUR, W4A16),
    "id-w4a16": (ID, W4A16),
    "cur-2of4": (CUR, SPARSE_2_4),
}


class Saved(NamedTuple):
    """A compressed model on disk, and what it answered in memory."""

    name: str
    path: Path
    logits: torch.Tensor
    log: list[str]


@pytest.fixture(scope="module", params=CASES)
def saved(
    request: pytest.FixtureRequest,
    smollm2: Path,
    smollm2_data: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> Saved:
    cur, then = CASES[request.param]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    log: list[str] = []
    sink = logger.add(lambda message: log.append(message.record["message"]), level="INFO")
    oneshot(model=model, dataset=smollm2_data, recipe=recipe_text(cur, then))
    logger.remove(sink)
    _check_factors(model, request.param)
    path = tmp_path_factory.mktemp(request.param) / "out"
    logits = answer(model)
    expected = parameter_bytes(model)
    model.save_pretrained(path, save_compressed=True)
    stored = (path / "model.safetensors").stat().st_size
    assert stored == pytest.approx(expected, rel=0.005)
    return Saved(request.param, path, logits, log)


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def _check_factors(model: Any, name: str) -> None:
    containers = [m for m in model.modules() if isinstance(m, FactoredLinear)]
    assert len(containers) == (6 if name.startswith("cur") else 14)
    for container in containers:
        assert container.dense is None
        for factor in container.factors.values():
            if "w4a16" in name:
                assert factor.quantization_scheme.weights.num_bits == 4
                assert factor.quantization_status == QuantizationStatus.FROZEN
            if "2of4" in name:
                groups = factor.weight.detach().reshape(-1, 4)
                assert ((groups != 0).sum(dim=1) <= 2).all()


def test_from_pretrained_equals_memory(saved: Saved) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved.path)
    assert torch.equal(answer(loaded), saved.logits)


def test_no_factor_fell_back_to_rounding(saved: Saved) -> None:
    assert not [line for line in saved.log if "round-to-nearest" in line]
    if "w4a16" in saved.name:
        quantized = [line for line in saved.log if line.startswith("Quantizing")]
        assert len(quantized) == (18 if saved.name.startswith("cur") else 28)


def test_saved_again_and_loaded_again(saved: Saved, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved.path)
    answer(loaded)  # unpacks quantized factors; they must be packed again
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(answer(again), saved.logits)
    first = json.loads((saved.path / "config.json").read_text())["quantization_config"]
    second = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert first["modules"] == second["modules"]
    assert (
        load_file(saved.path / "model.safetensors").keys()
        == load_file(tmp_path / "again" / "model.safetensors").keys()
    )


def test_remote_code_without_the_plugin(saved: Saved, tmp_path: Path) -> None:
    torch.save(saved.logits, tmp_path / "logits.pt")
    script = f"""
import sys, torch
sys.modules["cur_modifier"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved.path)!r}, trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.arange(1000, 1048)[None]).logits
assert torch.equal(logits, torch.load({str(tmp_path / "logits.pt")!r})), "other logits"
try:
    model.save_pretrained({str(tmp_path / "resaved")!r})
except ValueError:  # it could write no checkpoint that stops loaders without remote code
    print("refused")
"""
    done = _python(script, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused" in done.stdout
    assert "pip install cur-modifier" in done.stderr
    assert not (tmp_path / "resaved" / "config.json").exists()


def test_neither_plugin_nor_remote_code_fails_loudly(saved: Saved, tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules["cur_modifier"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(saved.path)!r})
"""
    done = _python(script, tmp_path)
    assert done.returncode != 0
    assert "needs-import-cur_modifier-or-trust_remote_code" in done.stderr


def _python(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, timeout=300
    )


def test_layout_describes_the_checkpoint(saved: Saved) -> None:
    config = json.loads((saved.path / "config.json").read_text())
    schema = Schema.read(config["quantization_config"])
    tensors = load_file(saved.path / "model.safetensors")
    for name, module in schema.modules.items():
        for factor, shape in module.factor_shapes.items():
            if schema.compressed_tensors is None:
                assert tensors[f"{name}.{factor}.weight"].shape == shape
            else:
                assert tuple(tensors[f"{name}.{factor}.weight_shape"].tolist()) == shape
    assert (schema.compressed_tensors is not None) == ("w4a16" in saved.name)
    assert (saved.path / "recipe_as_given.yaml").exists()


def test_a_missing_factor_is_named(saved: Saved, tmp_path: Path) -> None:
    broken = shutil.copytree(saved.path, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    lost = next(
        k
        for k in tensors
        if k.endswith(("cur_u.weight", "id_t.weight", "_u.weight_packed", "_t.weight_packed"))
    )
    del tensors[lost]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SchemaError, match=f"{lost.removesuffix('_packed')} is missing"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_truncated_weights_are_refused(saved: Saved, tmp_path: Path) -> None:
    broken = shutil.copytree(saved.path, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(Exception, match=r"(?i)invalid|incomplete|safetensor|header"):
        AutoModelForCausalLM.from_pretrained(broken)
