"""A third form through everything: recipe, checkpoint, loading, healing, refining, quantizing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from support import NO_PROCESSOR, Compress, recipe_text
from transformers import AutoModelForCausalLM

from cur_modifier.forms.base import factored_layers

PAIRS = {
    "targets": ["re:.*(q|k|v|o|gate|up|down)_proj$"],
    "form": "low_rank",
    "rank": {"ratio": 0.6},
    "layers": {"select": [2, 5]},
}
W4A16 = {
    "GPTQModifier": {
        "targets": ["re:.*lr_[ab]$"],
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["re:.*lr_[ab]$"],
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
            }
        },
    }
}
HEAL = {
    "CURHealModifier": {
        "steps": 8,
        "warmup_steps": 2,
        "validate_every": 4,
        "batch_size": 2,
        "mlflow": False,
    }
}
PROMPT = torch.arange(40, 88)[None]


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(PROMPT).logits


@pytest.mark.parametrize(
    ("settings", "then"),
    [
        ({}, None),
        ({"fit": "loss", "anchor": 0.25, "rank": {"ratio": 0.6, "budget": "sensitivity"}}, None),
        ({"refine": {"epochs": 1}}, None),
        ({}, HEAL),
        ({"multiple_of": 32}, W4A16),
    ],
    ids=["plain", "anchored by budget", "refined", "healed", "four bits"],
)
def test_a_recipe_makes_a_checkpoint_that_comes_back(
    tiny: Any,
    compress: Compress,
    tmp_path: Path,
    settings: dict[str, Any],
    then: dict[str, Any] | None,
) -> None:
    compress(tiny, PAIRS | settings, then)
    layers = factored_layers(tiny)
    assert {layer.form for layer in layers.values()} == {"low_rank"} and len(layers) > 10
    tiny.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(tiny), rtol=1e-4, atol=1e-4)
    assert all(f"{n}.lr_a.bias" in dict(loaded.named_parameters()) for n in layers if "attn" in n)


def test_a_later_stage_on_all_linears_reaches_the_factors(
    tiny_checkpoint: Path, tiny_data: Dataset
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    scheme = {"QuantizationModifier": {"targets": ["Linear"], "ignore": ["lm_head"]}}
    scheme["QuantizationModifier"]["scheme"] = "W8A8"
    recipe = recipe_text(PAIRS | {"multiple_of": 32}, scheme)
    oneshot(model=model, recipe=recipe, dataset=tiny_data, processor=NO_PROCESSOR)
    for layer in factored_layers(model).values():
        assert all(f.quantization_scheme is not None for f in layer.factors.values())


def test_it_loads_without_the_plugin(tiny: Any, compress: Compress, tmp_path: Path) -> None:
    compress(tiny, PAIRS)
    tiny.save_pretrained(tmp_path / "out")
    torch.save({"prompt": PROMPT, "logits": logits(tiny)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['cur_modifier'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "expected = torch.load(sys.argv[2])\n"
        "with torch.no_grad(): found = model(expected['prompt']).logits\n"
        "torch.testing.assert_close(found, expected['logits'], rtol=1e-4, atol=1e-4)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "expected.pt")],
        check=True,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "deim"}, "selection 'deim' chooses real rows or columns, and form"),
        ({"scores": "wanda"}, "without one takes the optimal approximation. Drop `scores`"),
        ({"share_skeleton": True}, "share_skeleton is set with form 'low_rank'"),
        ({"rank": {"fixed": 257}, "multiple_of": 1}, r"rank 257 is above 256 \(min\(out, in\)\)"),
    ],
)
def test_what_it_does_not_have_is_refused(
    tiny: Any, compress: Compress, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compress(tiny, PAIRS | settings)
