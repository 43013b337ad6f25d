"""Checkpoints of an earlier version compute what they computed then, and can be saved anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cur_modifier.checkpoint.remote_code import FOLDER
from cur_modifier.forms.base import factored_layers

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
NAMES = sorted(path.stem for path in CHECKPOINTS.glob("*.safetensors"))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt).logits[0]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_then_before_and_after_another_save(name: str, tmp_path: Path) -> None:
    then = load_file(CHECKPOINTS / f"{name}.safetensors")
    model = load(CHECKPOINTS / name)
    assert factored_layers(model)
    torch.testing.assert_close(logits(model, then["prompt"]), then["logits"], **CLOSE)

    model.save_pretrained(tmp_path / "again")
    shipped = {path.name for path in (tmp_path / "again").iterdir()}
    assert FOLDER in shipped and not any(name.endswith(".py") for name in shipped)
    again = logits(load(tmp_path / "again"), then["prompt"])
    torch.testing.assert_close(again, then["logits"], **CLOSE)


def test_the_code_of_then_still_reads_them_without_the_plugin(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["cur_modifier"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, found = sys.argv[1], {}
for name in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/{name}", dtype=torch.float32, trust_remote_code=True
    )
    with torch.no_grad():
        found[name] = model(load_file(f"{folder}/{name}.safetensors")["prompt"]).logits[0]
save_file(found, sys.argv[2])
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(CHECKPOINTS), str(tmp_path / "found"), *NAMES],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "found")
    for name in NAMES:
        then = load_file(CHECKPOINTS / f"{name}.safetensors")["logits"]
        torch.testing.assert_close(found[name], then, **CLOSE)
