"""Models with another number of neurons in each layer are served as transformers computes them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from llmcompressor import oneshot
from served import Answers, EngineError, by_engine, by_transformers, result, served, side_by_side
from support import asked_for, thorough
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from cur_modifier.checkpoint.resized import mark_resized
from cur_modifier.checkpoint.save import wrap_save_pretrained
from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.linalg import interpolative

pytestmark = [pytest.mark.serve, pytest.mark.slow]

STEPS = 32
LEFT = [192, 256, 96]  # of 256 neurons, by layer
RANK = 32
ROUND_TO_NEAREST = """
quantize_stage:
  quantize_modifiers:
    QuantizationModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 32}
"""


# Layers, producers and consumer of neurons, by architecture.
NEURONS: dict[str, tuple[str, list[str], str]] = {
    "llama": ("model.layers", ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
    "opt": ("model.decoder.layers", ["fc1"], "fc2"),
    "gpt2": ("transformer.h", ["mlp.c_fc"], "mlp.c_proj"),
}


def keep(linear: Any, *, outputs: int | None = None, inputs: int | None = None) -> None:
    """Leave the first outputs or inputs of a Linear."""
    weight, bias = linear.weight.detach(), linear.bias
    if isinstance(linear, Conv1D):
        weight = weight[:inputs, :outputs]
        linear.nx, linear.nf = weight.shape
    else:
        weight = weight[:outputs, :inputs]
        linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach()[:outputs].clone())


def remove_neurons(model: Any) -> None:
    """Leave the first neurons of each layer, another number in each."""
    layers, producers, consumer = NEURONS[model.config.model_type]
    for layer, left in zip(model.get_submodule(layers), LEFT, strict=True):
        for producer in producers:
            keep(layer.get_submodule(producer), outputs=left)
        keep(layer.get_submodule(consumer), inputs=left)


def remove_heads(model: Any) -> None:
    """Leave the first key/value head of the last layer, and its query heads."""
    attention = model.model.layers[-1].self_attn
    for name, kept in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1)):
        keep(attention.get_submodule(name), outputs=kept * attention.head_dim)
    keep(attention.o_proj, inputs=2 * attention.head_dim)


def factor(model: Any) -> None:
    """A row ID in the place of up and down in the first layer; gate stays dense next to them."""
    mlp = model.model.layers[0].mlp
    for name in ("up_proj", "down_proj"):
        linear = mlp.get_submodule(name)
        factors = interpolative(linear.weight.detach(), RANK)
        mlp.set_submodule(name, RowIDLinear.from_factors(factors, linear.bias.detach()))


def quantize(model: Any) -> None:
    """Round every Linear but the head to 4 bits."""
    oneshot(model=model, recipe=ROUND_TO_NEAREST)


# By what it shows: the model, what is done to it, and arguments of `vllm serve`.
CASES: dict[str, tuple[str, list[Any], list[str]]] = {
    "Llama": ("llama", [remove_neurons], []),
    "two ranks": ("llama", [remove_neurons, factor], ["--tensor-parallel-size", "2"]),
    "Llama, some factored": ("llama", [remove_neurons, factor], []),
    "OPT": ("opt", [remove_neurons], []),
    "GPT-2": ("gpt2", [remove_neurons], []),
    "four bits": ("llama", [remove_neurons, quantize], []),
    "heads": ("llama", [remove_heads], []),
}
BY_SERVER = ["Llama", "two ranks"]
BY_ENGINE = ["Llama, some factored", "OPT", "GPT-2", "four bits", "heads"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint for each case."""
    folder = tmp_path_factory.mktemp("sizes")
    found = {}
    for case, (name, changes, _) in CASES.items():
        path = folder / re.sub(r"\W+", "_", case)
        dense = path.with_suffix(".dense")
        build(name).save_pretrained(dense)  # llm-compressor copies files from where it came from
        model = AutoModelForCausalLM.from_pretrained(dense)
        for change in changes:
            change(model)
        mark_resized(model)
        wrap_save_pretrained(model)
        model.save_pretrained(path)
        found[case] = path
    return found


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    smollm2: Path,
    random_prompt: list[int],
) -> dict[str, Any]:
    """What each is served with, or why it is not."""
    jobs: dict[str, Any] = {
        case: partial(
            served,
            checkpoints[case],
            checkpoints[case].with_suffix(".log"),
            random_prompt,
            STEPS,
            "--tokenizer",
            str(smollm2),
            *CASES[case][2],
        )
        for case in BY_SERVER
        if case in asked_for(request, "case")
    }
    return side_by_side(jobs)


@pytest.fixture(scope="module")
def engine_answers(
    checkpoints: dict[str, Path], smollm2: Path, random_prompt: list[int]
) -> dict[str, Answers | EngineError]:
    """Likewise, by vLLM's engine alone."""
    plain = {case: checkpoints[case] for case in BY_ENGINE if case != "four bits"}
    four = {"four bits": checkpoints["four bits"]}
    return {
        **by_engine(plain, smollm2, random_prompt, STEPS),
        **by_engine(four, smollm2, random_prompt, STEPS, "bfloat16"),
    }


@pytest.mark.parametrize("case", [BY_SERVER[0], *thorough(*BY_SERVER[1:])])
def test_a_server_computes_what_transformers_does(
    case: str, answers: dict[str, Any], checkpoints: dict[str, Path], random_prompt: list[int]
) -> None:
    found = result(answers, case)
    exact = by_transformers(checkpoints[case], random_prompt, STEPS)
    assert exact.logprobs.std() > 0.5  # or equality would say little
    assert exact.distance(found) < 1e-4
    assert exact.greedy == found.greedy


@pytest.mark.parametrize("case", ["Llama, some factored", "OPT", "GPT-2"])
def test_the_engine_computes_what_transformers_does(
    case: str,
    engine_answers: dict[str, Any],
    checkpoints: dict[str, Path],
    random_prompt: list[int],
) -> None:
    found = result(engine_answers, case)
    exact = by_transformers(checkpoints[case], random_prompt, STEPS)
    assert exact.distance(found) < 1e-4
    assert exact.greedy == found.greedy


def test_four_bits(
    engine_answers: dict[str, Any], checkpoints: dict[str, Path], random_prompt: list[int]
) -> None:
    """Quantized weights have kernels for 16 bits; they may round as transformers does."""
    found = result(engine_answers, "four bits")
    path = checkpoints["four bits"]
    exact = by_transformers(path, random_prompt, STEPS)
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path.with_suffix(".again"))
    assert by_transformers(path.with_suffix(".again"), random_prompt, STEPS).distance(exact) == 0
    rounded = by_transformers(path, random_prompt, STEPS, torch.bfloat16)
    assert exact.deviation(found) < 1.5 * exact.deviation(rounded)


def test_heads_of_one_layer_are_refused(
    engine_answers: dict[str, Any], checkpoints: dict[str, Path], random_prompt: list[int]
) -> None:
    assert by_transformers(checkpoints["heads"], random_prompt, STEPS).greedy
    refusal = engine_answers["heads"]
    assert isinstance(refusal, EngineError), refusal
    message = r"layers\.2\.self_attn\.q_proj: its heads are not those of config\.json.*uniform"
    assert re.search(message, str(refusal)), str(refusal)[-4000:]
