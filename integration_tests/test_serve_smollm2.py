"""SmolLM2, factored and quantized, served by vLLM and through transformers.

The figures that the README gives are what these tests print (``pytest -rA``, or on failure).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from llmcompressor import oneshot
from mlflow import MlflowClient
from served import (
    FAST_DTYPE,
    Answers,
    by_engine,
    by_transformers,
    result,
    serve_quietly,
    served,
    side_by_side,
)
from support import (
    ID,
    REPOSITORY,
    ROUND_TO_NEAREST,
    W8A8,
    asked_for,
    recipe_text,
    run_project,
    thorough,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from cur_modifier.data import calibration_dataset
from cur_modifier.precision import computed_dtype

pytestmark = [pytest.mark.serve, pytest.mark.slow]

STEPS = 64
CUR_ALL = {"rank": {"max": 256}, "multiple_of": 32, "layers": {"select": "all"}}
ID_ALL = {**ID, "layers": {"select": "all"}}
TEN = {"select": "angular", "count": 10}
CUR_TEN = {"rank": {"max": 256}, "multiple_of": 32, "layers": TEN}
ID_TEN = {**ID, "layers": TEN}
DENSE_W8A8 = {"QuantizationModifier": {**W8A8["QuantizationModifier"], "targets": ["Linear"]}}

# Recipes, and the dtype of the checkpoint: exact figures need the float32 that is stored.
CHECKPOINTS: dict[str, tuple[str, str]] = {
    "cur": (recipe_text(CUR_ALL), "float32"),
    "id": (recipe_text(ID_ALL), "float32"),
    "cur-w4a16": (recipe_text(CUR_TEN, ROUND_TO_NEAREST), "bfloat16"),
    "id-w4a16": (recipe_text(ID_TEN, ROUND_TO_NEAREST), "bfloat16"),
    "cur-w8a8": (recipe_text(CUR_TEN, W8A8), "bfloat16"),
    "dense-w8a8": (
        yaml.safe_dump({"compress_stage": {"quantization_modifiers": DENSE_W8A8}}),
        "bfloat16",
    ),
}
EAGER = ("--enforce-eager",)
EXACT: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("dense", EAGER),
    "cur": ("cur", EAGER),
    "id": ("id", EAGER),
    "cur on three ranks": ("cur", (*EAGER, "--tensor-parallel-size", "3")),
    "id on three ranks": ("id", (*EAGER, "--tensor-parallel-size", "3")),
    "cur compiled": ("cur", ()),
    "id compiled": ("id", ()),
    # What users get: at this size only gate and up stay in factors.
    "id by default": ("id", (*EAGER, "--additional-config", "{}")),
}
EXACT_OFTEN = ["cur", "id compiled", "id by default"]


@pytest.fixture(scope="module")
def prompt(smollm2: Path, reference_text: Path) -> list[int]:
    """201 tokens of real text: 200 of them have a log-probability."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return tokenizer(reference_text.read_text()[5000:8000]).input_ids[:201]


@pytest.fixture(scope="module")
def data(smollm2: Path, reference_text: Path) -> Dataset:
    """Enough tokens for 1536 inputs. With fewer the core is so ill-conditioned that float32 itself
    is 12 times further from float64."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return calibration_dataset(reference_text, tokenizer, samples=16, sequence_length=256)


@pytest.fixture(scope="module")
def checkpoints(
    request: pytest.FixtureRequest,
    smollm2: Path,
    data: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The dense model and what the recipes make of it, as far as tests ask for them."""
    folder = tmp_path_factory.mktemp("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    paths = {"dense": smollm2}
    wanted = {EXACT[case][0] for case in asked_for(request, "case")}
    wanted |= {name for names in asked_for(request, "names") for name in names}
    for name, (recipe, dtype) in CHECKPOINTS.items():
        if name not in wanted:
            continue
        stored = getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=computed_dtype(stored))
        oneshot(model=model, dataset=data, recipe=recipe)
        paths[name] = folder / name
        model.to(stored).save_pretrained(paths[name], save_compressed=True)
        tokenizer.save_pretrained(paths[name])
    return paths


@pytest.fixture(scope="module")
def exact(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    prompt: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What the float32 servers answer."""
    logs = tmp_path_factory.mktemp("logs")
    return side_by_side(
        {
            case: partial(
                served, checkpoints[name], logs / f"{case}.log", prompt, STEPS, *arguments
            )
            for case, (name, arguments) in EXACT.items()
            if case in asked_for(request, "case")
        }
    )


@pytest.fixture(scope="module")
def rounded(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    smollm2: Path,
    prompt: list[int],
) -> dict[str, Any]:
    """What vLLM's engine answers in bfloat16, in one process: five servers take much longer, and
    :func:`test_lm_eval_agrees` has a real one of four bits."""
    wanted = {name for names in asked_for(request, "names") for name in names}
    paths = {name: checkpoints[name] for name in sorted(wanted)}
    return by_engine(paths, smollm2, prompt, steps=1, dtype="bfloat16")


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path], prompt: list[int]) -> Callable[[str], Answers]:
    """``reference(name)``: what transformers answers in float32, weights dequantized."""
    known: dict[str, Answers] = {}

    def answer(name: str) -> Answers:
        if name not in known:
            known[name] = by_transformers(checkpoints[name], prompt, STEPS)
        return known[name]

    return answer


@pytest.mark.parametrize(
    "case", [*EXACT_OFTEN, *thorough(*(case for case in EXACT if case not in EXACT_OFTEN))]
)
def test_float32_is_what_transformers_computes(
    case: str, exact: dict[str, Any], reference: Callable[[str], Answers]
) -> None:
    wanted, found = reference(EXACT[case][0]), result(exact, case)
    print(f"{case}: largest difference of 200 log-probabilities {wanted.distance(found):.1e}")
    assert wanted.distance(found) < 1e-3
    assert wanted.greedy == found.greedy


@pytest.mark.parametrize(
    "names", [("id-w4a16", "dense"), *thorough(("cur-w4a16", "dense"))], ids="÷".join
)
def test_w4a16_rounds_as_the_dense_model_does(
    names: tuple[str, str],
    rounded: dict[str, Any],
    reference: Callable[[str], Answers],
    checkpoints: dict[str, Path],
    prompt: list[int],
) -> None:
    """Or as transformers does in bfloat16 with the same factors, where they amplify rounding more
    than the dense model: that is the checkpoint's doing, and depends on its calibration."""
    name, beside = names
    dense = reference(beside).deviation(result(rounded, beside))
    found = reference(name).deviation(result(rounded, name))
    transformers = by_transformers(checkpoints[name], prompt, 1, torch.bfloat16)
    expected = reference(name).deviation(transformers)
    print(
        f"{name}: root mean square deviation {found:.4f}; the dense model in bfloat16 {dense:.4f}; "
        f"transformers' own in bfloat16 {expected:.4f}"
    )
    assert found < 1.5 * max(dense, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("names", [("cur-w8a8", "dense-w8a8")], ids="÷".join)
def test_w8a8_rounds_as_dense_w8a8_does(
    names: tuple[str, str],
    rounded: dict[str, Any],
    reference: Callable[[str], Answers],
    checkpoints: dict[str, Path],
    prompt: list[int],
) -> None:
    """Activations rounded to 8 bits differ wherever 16 bits differ in the last place, in any two
    implementations: the dense W8A8 model, and transformers in bfloat16, are the measure."""
    by_name = {name: reference(name).deviation(result(rounded, name)) for name in names}
    transformers = by_transformers(checkpoints["cur-w8a8"], prompt, 1, torch.bfloat16)
    expected = reference("cur-w8a8").deviation(transformers)
    print(f"deviations {by_name}; transformers' own in bfloat16 {expected:.4f}")
    assert by_name["cur-w8a8"] < 1.5 * by_name["dense-w8a8"]
    assert by_name["cur-w8a8"] < 1.5 * expected


@pytest.mark.thorough
@pytest.mark.parametrize("names", [("id-w4a16",)], ids="÷".join)
def test_lm_eval_agrees(names: tuple[str], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    data = REPOSITORY.parent / "shared" / "data" / "zeroshot"
    if not data.is_dir():
        pytest.skip(f"no questions at {data}")
    path = checkpoints[names[0]]
    given = {"model": path, "tasks": "arc_easy", "task_data": data, "limit": 200}

    def accuracies(name: str, **extra: object) -> dict[str, float]:
        store = f"sqlite:///{tmp_path / name}.db"
        done = run_project("evaluate", store, **given, **extra)
        assert done.returncode == 0, done.stderr[-4000:]
        [run] = MlflowClient(tracking_uri=store).search_runs(["0"])
        return run.data.metrics

    with serve_quietly(path, tmp_path / "vllm.log", *EAGER, dtype=FAST_DTYPE) as server:
        found = accuracies("vllm", backend=server.url)
    wanted = accuracies("transformers", dtype=FAST_DTYPE)
    print(f"vLLM {found}\ntransformers {wanted}")
    for measure in ("arc_easy/acc", "arc_easy/acc_norm"):
        assert abs(found[measure] - wanted[measure]) <= wanted[f"{measure}_stderr"]
