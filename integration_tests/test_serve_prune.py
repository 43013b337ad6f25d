"""What a removal leaves is served: with one size for all layers by stock vLLM, without a plugin."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from architectures import build
from datasets import Dataset
from llmcompressor import oneshot
from served import WITHOUT_PLUGINS, by_transformers, result, served, side_by_side
from support import NO_PROCESSOR, asked_for, thorough
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.serve, pytest.mark.slow]

STEPS = 32
PRUNE: dict[str, Any] = {
    "multiple_of": 32,
    "budget": {"ratio": 0.7},
    "sensitivity": {"samples": 4},
    "mlflow": False,
}
GPTQ = {
    "GPTQModifier": {
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
            }
        },
    }
}
# By what it shows: fields of the stage, what follows it, whether the plugin is there, the dtype.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool, str]] = {
    "neurons and heads, no plugin": ({"units": ["neurons", "heads"]}, {}, False, "float32"),
    "neurons, four bits, no plugin": ({}, GPTQ, False, "bfloat16"),
    "neurons by layer": ({"shapes": "free"}, {}, True, "float32"),
}
FIRST, *OTHERS = CASES
# What vLLM's own kernel for 4 bits takes on a CPU.
HAS_4_BITS = "AVX512" in torch.backends.cpu.get_cpu_capability()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, random_tokens: Dataset) -> Any:
    """A checkpoint for each case."""
    folder = tmp_path_factory.mktemp("prune")
    dense = folder / "dense"
    build("llama").save_pretrained(dense)
    found = {}
    for number, (case, (fields, later, _, _)) in enumerate(CASES.items()):
        model = AutoModelForCausalLM.from_pretrained(dense)
        stage: dict[str, Any] = {"prune_modifiers": {"IDPruningModifier": PRUNE | fields}}
        if later:
            stage["later_modifiers"] = later
        text = yaml.safe_dump({"compress_stage": stage}, sort_keys=False)
        oneshot(model=model, dataset=random_tokens, recipe=text, processor=NO_PROCESSOR)
        found[case] = folder / str(number)
        model.save_pretrained(found[case], save_compressed=True)
    return found


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    smollm2: Path,
    random_prompt: list[int],
) -> Any:
    jobs: dict[str, Any] = {}
    for case in asked_for(request, "case"):
        _, later, plugin, dtype = CASES[case]
        if later and not HAS_4_BITS:
            continue
        jobs[case] = partial(
            served,
            checkpoints[case],
            checkpoints[case].with_suffix(".log"),
            random_prompt,
            STEPS,
            "--tokenizer",
            str(smollm2),
            dtype=dtype,
            environment=None if plugin else WITHOUT_PLUGINS,
        )
    return side_by_side(jobs)


@pytest.mark.parametrize("case", [FIRST, *thorough(*OTHERS)])
def test_a_server_computes_what_transformers_does(
    case: str, answers: Any, checkpoints: dict[str, Path], random_prompt: list[int]
) -> None:
    if CASES[case][1] and not HAS_4_BITS:
        pytest.skip("vLLM has no kernel for 4 bits on this CPU: it takes AVX-512")
    found = result(answers, case)
    exact = by_transformers(checkpoints[case], random_prompt, STEPS)
    assert exact.logprobs.std() > 0.5  # or equality would say little
    if CASES[case][3] == "float32":
        assert exact.distance(found) < 1e-4
        assert exact.greedy == found.greedy
    else:
        assert exact.deviation(found) < 0.1
