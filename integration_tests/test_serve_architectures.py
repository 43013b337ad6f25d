"""Every architecture that the README lists, factored by our stage, run by vLLM's engine, compared.

What a server adds to the engine does not depend on the architecture; `test_serve_smollm2.py` has
real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES, CUR, REST, ROW_ID, SHARED, build, factor
from datasets import Dataset
from served import Answers, EngineError, by_engine, by_transformers, result
from support import asked_for, thorough

pytestmark = [pytest.mark.serve, pytest.mark.slow]

STEPS = 32
SHARING = {f"{name}_shared": name for name in ("llama", "gemma3", "opt")}
OFTEN = ["llama", "gemma3", "phi3", "opt", "qwen3_moe", "llama_shared"]


@pytest.fixture(scope="module")
def checkpoints(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    random_tokens: Dataset,
) -> dict[str, Path]:
    """A checkpoint of each architecture: CUR, row ID and dense side by side in fused modules; and
    of some with the skeletons of fused modules shared."""
    folder = tmp_path_factory.mktemp("architectures")
    wanted = asked_for(request, "name")
    mixed = {
        name: factor(build(name), folder / name, random_tokens, CUR, ROW_ID)
        for name in ARCHITECTURES
        if name in wanted
    }
    return mixed | {
        case: factor(build(name), folder / case, random_tokens, REST, SHARED)
        for case, name in SHARING.items()
        if case in wanted
    }


@pytest.fixture(scope="module")
def answers(
    checkpoints: dict[str, Path], smollm2: Path, random_prompt: list[int]
) -> dict[str, Answers | EngineError]:
    """What each is answered with, or why it is not."""
    return by_engine(checkpoints, smollm2, random_prompt, STEPS)


@pytest.mark.parametrize(
    "name", [*OFTEN, *thorough(*(n for n in (*ARCHITECTURES, *SHARING) if n not in OFTEN))]
)
def test_served_as_transformers_computes(
    name: str, answers: dict[str, Any], checkpoints: dict[str, Path], random_prompt: list[int]
) -> None:
    found = result(answers, name)
    wanted = by_transformers(checkpoints[name], random_prompt, STEPS)
    assert wanted.distance(found) < 1e-4
    assert wanted.greedy == found.greedy
    assert wanted.logprobs.std() > 0.5  # or equality would say little
