"""Plain pairs through vLLM: alone, quantized, and on two ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from datasets import Dataset
from llmcompressor import oneshot
from served import by_engine, by_transformers, result, served, side_by_side
from support import NO_PROCESSOR, asked_for, recipe_text, thorough
from test_low_rank import W4A16
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.serve, pytest.mark.slow]

STEPS = 16
PAIRS = {
    "targets": ["re:.*_proj$"],
    "form": "low_rank",
    "rank": {"fixed": 32},
    "layers": {"select": "all"},
}


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, random_tokens: Dataset
) -> dict[str, Path]:
    """A Llama of plain pairs, as they are and in 4 bits."""
    folder = tmp_path_factory.mktemp("pairs")
    build("llama").save_pretrained(folder / "dense")
    found = {}
    for name, then in (("float", None), ("four bits", W4A16)):
        model = AutoModelForCausalLM.from_pretrained(folder / "dense")
        recipe = recipe_text(PAIRS, then)
        oneshot(model=model, recipe=recipe, dataset=random_tokens, processor=NO_PROCESSOR)
        found[name] = folder / name.replace(" ", "_")
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    smollm2: Path,
    random_prompt: list[int],
) -> dict[str, Any]:
    ask = (random_prompt, STEPS)
    plain, quantized = ({name: checkpoints[name]} for name in ("float", "four bits"))
    two_ranks = ("--enforce-eager", "--tensor-parallel-size", "2", "--tokenizer", str(smollm2))
    path = checkpoints["float"]
    jobs: dict[str, Any] = {
        "engine": partial(by_engine, plain, smollm2, *ask),
        # Quantized weights have kernels for 16 bits.
        "16 bits": partial(by_engine, quantized, smollm2, *ask, "bfloat16"),
    }
    if "two ranks" in asked_for(request, "case"):
        log = path.with_suffix(".log")
        jobs["two ranks"] = partial(served, path, log, *ask, *two_ranks)
    found = side_by_side(jobs)
    return found | result(found, "engine") | result(found, "16 bits")


@pytest.mark.parametrize("case", ["float", *thorough("two ranks")])
def test_served_as_transformers_computes_it(
    case: str, answers: dict[str, Any], checkpoints: dict[str, Path], random_prompt: list[int]
) -> None:
    wanted = by_transformers(checkpoints["float"], random_prompt, STEPS)
    found = result(answers, case)
    assert found.distance(wanted) < 1e-3
    assert found.greedy == wanted.greedy


def test_four_bits_are_served_as_loaded(
    answers: dict[str, Any], checkpoints: dict[str, Path], random_prompt: list[int]
) -> None:
    """As far as transformers' own rounding in bfloat16 goes."""
    path = checkpoints["four bits"]
    wanted = by_transformers(path, random_prompt, STEPS)
    rounded = by_transformers(path, random_prompt, STEPS, torch.bfloat16)
    assert wanted.deviation(result(answers, "four bits")) < 1.5 * wanted.deviation(rounded)
