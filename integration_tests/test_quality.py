"""What the activations buy, on SmolLM2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from support import ROUND_TO_NEAREST, W4A16, recipe_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from cur_modifier.data import calibration_dataset, read_documents, token_windows
from cur_modifier.evaluate import perplexity


@pytest.fixture(scope="module")
def data(smollm2: Path, reference_text: Path) -> tuple[Dataset, torch.Tensor]:
    """Calibration data, and windows of a later part of the same text."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    calibration = calibration_dataset(reference_text, tokenizer, samples=16, sequence_length=128)
    windows = token_windows(
        read_documents(reference_text), tokenizer, windows=40, sequence_length=256
    )
    return calibration, windows[-8:]


def _perplexity(smollm2: Path, data: Any, cur: dict[str, Any], then: Any = None) -> float:
    calibration, windows = data
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    oneshot(model=model, dataset=calibration, recipe=recipe_text(cur, copy.deepcopy(then)))
    return perplexity(model, windows).perplexity


# Few modules and a high rank keep the noise of the factors below that of four bits.
CUR = {"rank": {"fixed": 192}, "targets": ["re:.*[qo]_proj$"], "layers": {"select": [5, 10, 15]}}


def test_each_part_of_the_fit_pays(smollm2: Path, data: Any) -> None:
    stage: dict[str, Any] = {
        "targets": ["re:.*(q|k|v|o|gate|up|down)_proj$"],
        "form": "id",
        "layers": {"select": [8, 9, 10, 11]},
    }
    ratio = {"ratio": 0.5}
    gram = _perplexity(smollm2, data, stage | {"rank": ratio})
    stage |= {"fit": "loss", "anchor": 0.25}
    uniform = _perplexity(smollm2, data, stage | {"rank": ratio})
    stage["rank"] = ratio | {"budget": "sensitivity"}
    budget = _perplexity(smollm2, data, stage)
    refined = _perplexity(smollm2, data, stage | {"refine": {"epochs": 4, "batch_size": 2}})
    assert refined < budget < uniform < gram, (refined, budget, uniform, gram)


@pytest.mark.thorough
def test_gptq_beats_rounding_on_the_factors(smollm2: Path, data: Any) -> None:
    gptq = _perplexity(smollm2, data, CUR, W4A16)
    rounded = _perplexity(smollm2, data, CUR, ROUND_TO_NEAREST)
    assert gptq < rounded


@pytest.mark.thorough
def test_fit_to_activations_beats_plain_core_and_id_beats_cur(smollm2: Path, data: Any) -> None:
    layers = {"select": [5, 10, 15, 20]}
    plain = _perplexity(smollm2, data, {"fit": "weight", "layers": layers})
    fitted = _perplexity(smollm2, data, {"layers": layers})
    interpolated = _perplexity(
        smollm2, data, {"form": "id", "rank": {"ratio": 0.7}, "layers": layers}
    )
    assert interpolated < fitted < plain
