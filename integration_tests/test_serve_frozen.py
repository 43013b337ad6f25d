"""Checkpoints that an earlier version wrote are served as transformers computed them then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from served import Answers, by_engine, by_transformers, result
from support import REPOSITORY

pytestmark = pytest.mark.serve

FROZEN = REPOSITORY / "tests" / "checkpoints"
STEPS = 8


def frozen(name: str) -> tuple[list[int], torch.Tensor]:
    """The prompt, and log-probabilities ``(n − 1,)`` of its tokens but the first, computed in
    float32 by the version that wrote the checkpoint."""
    stored = load_file(FROZEN / f"{name}.safetensors")
    [prompt] = stored["prompt"]
    logprobs = stored["logits"][:-1].log_softmax(-1)
    return prompt.tolist(), logprobs.gather(-1, prompt[1:, None])[:, 0]


@pytest.mark.parametrize(("name", "dtype"), [("cur", "float32"), ("row_id_w4a16", "bfloat16")])
def test_served_as_computed_then(name: str, dtype: str, smollm2: Path) -> None:
    prompt, logprobs = frozen(name)
    assert logprobs.std() > 0.5  # or equality would say little
    answers = by_engine({name: FROZEN / name}, smollm2, prompt, STEPS, dtype)
    found = result(answers, name)
    exact = Answers(logprobs, [])
    if dtype == "float32":
        assert exact.distance(found) < 1e-3
    else:  # quantized weights have kernels for 16 bits; they may round as transformers does
        rounded = by_transformers(FROZEN / name, prompt, STEPS, torch.bfloat16)
        assert exact.deviation(found) < 1.5 * exact.deviation(rounded)
