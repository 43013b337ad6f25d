"""Every architecture that the README lists, factored by our stage, served, compared."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, CUR_TARGETS, ID_TARGETS, build, factor
from datasets import Dataset
from serving import Answers, by_transformers, served, side_by_side

pytestmark = [pytest.mark.serve, pytest.mark.slow]

STEPS = 32


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """Longer than the sliding windows."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 1024, (120,), generator=generator).tolist()


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, random_tokens: Dataset
) -> dict[str, Path]:
    """A checkpoint of each architecture: CUR, row ID and dense side by side in fused modules."""
    folder = tmp_path_factory.mktemp("architectures")
    cur = {"targets": [CUR_TARGETS], "rank": {"fixed": 48}, "layers": {"select": [0, 1]}}
    row_id = {
        "targets": [ID_TARGETS],
        "form": "id",
        "rank": {"fixed": 40},
        "layers": {"select": [0, 2]},
    }
    return {
        name: factor(build(name), folder / name, random_tokens, cur, row_id)
        for name in ARCHITECTURES
    }


@pytest.fixture(scope="module")
def answers(
    checkpoints: dict[str, Path], smollm2: Path, prompt: list[int]
) -> dict[str, Answers | BaseException]:
    """What each is served with, or why it is not."""
    jobs: dict[str, Any] = {
        name: partial(
            served,
            path,
            path.with_suffix(".log"),
            prompt,
            STEPS,
            "--enforce-eager",
            "--tokenizer",
            str(smollm2),
        )
        for name, path in checkpoints.items()
    }
    return side_by_side(jobs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_served_as_transformers_computes(
    name: str, answers: dict[str, Any], checkpoints: dict[str, Path], prompt: list[int]
) -> None:
    found = answers[name]
    if isinstance(found, BaseException):
        raise found
    wanted = by_transformers(checkpoints[name], prompt, STEPS)
    assert wanted.distance(found) < 1e-4
    assert wanted.greedy == found.greedy
    assert wanted.logprobs.std() > 0.5  # or equality would say little
