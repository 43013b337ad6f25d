"""Tensor parallel with real processes: factored and quantized, heads split and repeated."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CUR_TARGETS, ID_TARGETS, build, factor
from datasets import Dataset
from served import by_transformers, result, served, side_by_side
from support import MIXED, ROUND_TO_NEAREST, W8A8, asked_for, thorough

pytestmark = [pytest.mark.serve, pytest.mark.slow]

STEPS = 32
CUR = {"targets": [CUR_TARGETS], "rank": {"fixed": 32}, "layers": {"select": "all"}}
ROW_ID = {"targets": [ID_TARGETS], "form": "id", "rank": {"fixed": 32}, "layers": {"select": "all"}}
# By what it shows: the model, ranks, and what quantizes the factors.
CASES: dict[str, tuple[str, int, dict[str, Any] | None]] = {
    "key and value heads split": ("llama", 2, None),
    "key and value head on three ranks": ("llama_one_kv_head", 3, None),
    "fused in the checkpoint": ("phi3", 2, None),
    "W4A16": ("llama_one_kv_head", 3, ROUND_TO_NEAREST),
    "W8A8": ("llama_one_kv_head", 2, W8A8),
    "4 bits, 8 bits and none in one module": ("llama_one_kv_head", 1, MIXED),
}
OFTEN = ["key and value head on three ranks", "W4A16"]
SELDOM = [case for case in CASES if case not in OFTEN]


@pytest.fixture(scope="module")
def checkpoints(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    random_tokens: Dataset,
) -> dict[str, Path]:
    """A checkpoint for each case."""
    folder = tmp_path_factory.mktemp("parallel")
    return {
        case: factor(
            build(model), folder / case.replace(" ", "_"), random_tokens, CUR, ROW_ID, then
        )
        for case, (model, _, then) in CASES.items()
        if case in asked_for(request, "case")
    }


@pytest.fixture(scope="module")
def answers(
    checkpoints: dict[str, Path], smollm2: Path, random_prompt: list[int]
) -> dict[str, Any]:
    """What each is served with, or why it is not."""
    jobs: dict[str, Any] = {
        case: partial(
            served,
            checkpoints[case],
            checkpoints[case].with_suffix(".log"),
            random_prompt,
            STEPS,
            "--enforce-eager",
            "--tokenizer",
            str(smollm2),
            "--tensor-parallel-size",
            str(ranks),
            dtype="bfloat16" if then else "float32",
        )
        for case, (_, ranks, then) in CASES.items()
        if case in checkpoints
    }
    return side_by_side(jobs)


@pytest.mark.parametrize("case", [*OFTEN, *thorough(*SELDOM)])
def test_ranks_together_compute_what_transformers_does(
    case: str, answers: dict[str, Any], checkpoints: dict[str, Path], random_prompt: list[int]
) -> None:
    found = result(answers, case)
    exact = by_transformers(checkpoints[case], random_prompt, STEPS)
    if CASES[case][2] is None:
        assert exact.distance(found) < 1e-4
        assert exact.greedy == found.greedy
    else:  # quantized weights have kernels for 16 bits; they may round as transformers does
        rounded = by_transformers(checkpoints[case], random_prompt, STEPS, torch.bfloat16)
        assert exact.deviation(found) < 1.5 * exact.deviation(rounded)
