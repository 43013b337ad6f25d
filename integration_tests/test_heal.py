"""Healing moves the free factors and nothing else, never for the worse, and survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from support import REPOSITORY, ROUND_TO_NEAREST, W4A16, Compress, recipe_text
from torch import nn
from transformers import AutoModelForCausalLM

from cur_modifier.forms.base import FactoredLinear
from cur_modifier.training.state import TrainingState

IDS = torch.arange(40, 72)[None]
# Weights, not activations, guide this fit: it leaves something to heal even in a random model.
CUR = {"fit": "weight", "rank": {"fixed": 32}, "layers": {"select": [2, 5]}}
ID = {**CUR, "form": "id"}
HEAL = {"steps": 24, "warmup_steps": 4, "validate_every": 6, "batch_size": 2, "mlflow": False}


def heal(**settings: Any) -> dict[str, Any]:
    return {"CURHealModifier": {**HEAL, **settings}}


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone()
        for owner, module in model.named_modules()
        if isinstance(module, FactoredLinear)
        for name, tensor in ((f"{owner}.{k}", v) for k, v in module.state_dict().items())
    }


def losses(log: list[str]) -> tuple[float, float]:
    (line,) = [line for line in log if line.startswith("healing: validation loss")]
    words = line.split()
    return float(words[3]), float(words[5])


@pytest.mark.parametrize(("cur", "free"), [(CUR, "cur_u"), (ID, "id_t")], ids=["cur", "id"])
def test_only_the_free_factors_move(
    tiny: Any,
    tiny_checkpoint: Path,
    compress: Compress,
    log: list[str],
    cur: dict[str, Any],
    free: str,
) -> None:
    untouched = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    for model, then in ((untouched, None), (tiny, heal(learning_rate=3e-3))):
        torch.manual_seed(0)  # llm-compressor's loader shuffles with the global generator
        compress(model, cur, then)
    before, after = factors(untouched), factors(tiny)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == (f".{free}." not in name), name
    for name, value in untouched.state_dict().items():
        if f".{free}." not in name:
            assert torch.equal(value, tiny.state_dict()[name]), name
    first, last = losses(log)
    assert last < first
    assert all(p.requires_grad for p in tiny.parameters())
    assert all(m.teacher is None for m in tiny.modules() if isinstance(m, FactoredLinear))


def test_a_loss_that_only_rises_changes_nothing(
    tiny: Any, tiny_checkpoint: Path, compress: Compress, log: list[str]
) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    for model, then in ((other, None), (tiny, heal(learning_rate=30.0, warmup_steps=0))):
        torch.manual_seed(0)
        compress(model, CUR, then)
    before, after = factors(other), factors(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)
    (warning,) = [line for line in log if "diverged" in line and "Lower" in line]
    assert "factors of step 0" in warning and "learning_rate (now 30)" in warning


def test_the_logits_count_where_asked(tiny: Any, compress: Compress, log: list[str]) -> None:
    compress(tiny, CUR, heal(logits_weight=1.0, steps=8))
    first, last = losses(log)
    assert last <= first


def test_the_first_layer_and_bfloat16(tiny: Any, compress: Compress, log: list[str]) -> None:
    tiny.to(torch.bfloat16)
    compress(tiny, {**CUR, "layers": {"select": [0, 1]}}, heal())
    first, last = losses(log)
    assert last < first
    assert tiny.model.layers[0].self_attn.q_proj.cur_u.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [True, False])
def test_the_teacher_is_the_same_cached_or_not(
    tiny: Any, tiny_checkpoint: Path, compress: Compress, log: list[str], autocast: bool
) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    for model, gib in ((tiny, 1), (other, 0)):
        torch.manual_seed(0)
        settings = heal(teacher_cache_gib=gib, steps=8, autocast=autocast, logits_weight=0.5)
        compress(model, CUR, settings)
    assert all(torch.equal(v, factors(other)[k]) for k, v in factors(tiny).items())
    assert len([line for line in log if "the dense model runs again" in line]) == 1


def test_it_does_not_touch_the_global_generator(tiny: Any, compress: Compress) -> None:
    torch.manual_seed(0)
    compress(tiny, CUR, heal(steps=5, seed=3))
    short = torch.rand(1)
    other = AutoModelForCausalLM.from_pretrained(tiny.name_or_path)
    torch.manual_seed(0)
    compress(other, CUR, heal(steps=8, seed=4))
    assert torch.equal(torch.rand(1), short)


@pytest.mark.parametrize("follower", [W4A16, ROUND_TO_NEAREST], ids=["gptq", "rtn"])
def test_heals_before_four_bits(
    tiny: Any, compress: Compress, log: list[str], tmp_path: Path, follower: dict[str, Any]
) -> None:
    compress(tiny, CUR, {**heal(steps=12), **follower})
    first, last = losses(log)
    assert last < first
    for module in tiny.modules():
        if isinstance(module, FactoredLinear):
            assert all(f.quantization_scheme.weights.num_bits == 4 for f in module.factors.values())
    with torch.no_grad():
        expected = tiny(IDS).logits
    tiny.save_pretrained(tmp_path / "out", save_compressed=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_stagnation_is_explained_with_numbers(
    tiny: Any, compress: Compress, log: list[str]
) -> None:
    cur = {**CUR, "fit": "gram", "rank": {"fixed": 8}, "layers": {"select": "all"}}
    compress(tiny, cur, heal(patience=9, learning_rate=1e-6))
    (warning,) = [line for line in log if "healing stagnates" in line]
    assert (
        "subspace is too small" in warning and "(rank 8)" in warning and "Raise the rank" in warning
    )


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (heal(), None, "no factored modules to heal.*behind the CURModifier"),
        (None, {**ROUND_TO_NEAREST, **heal()}, "already quantized.*Heal first"),
        (None, heal(batch_size=8), "batch_size 8 is more than the 7 windows to train on"),
    ],
)
def test_refused(tiny: Any, compress: Compress, first: Any, then: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(tiny, CUR, then, recipe_first=first)


def test_refused_without_data_or_with_one_sample(
    tiny: Any, tiny_data: Any, compress: Compress
) -> None:
    cur = {**CUR, "scores": "weight"}
    with pytest.raises(ValueError, match="no calibration data, but healing compares"):
        compress(tiny, cur, heal(), dataset=None)
    one = AutoModelForCausalLM.from_pretrained(tiny.name_or_path)
    with pytest.raises(ValueError, match="1 calibration samples can't be split"):
        compress(one, cur, heal(), dataset=tiny_data.select([0]))


def test_refused_where_the_dense_layers_are_gone(
    tiny: Any, compress: Compress, tmp_path: Path, tiny_data: Any
) -> None:
    compress(tiny, CUR)
    with pytest.raises(ValueError, match=r"factored in an earlier run.*into one recipe"):
        compress(tiny, {"targets": ["re:.*o_proj$"], **CUR, "layers": {"select": [1]}}, heal())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 24}, "warmup_steps 24 leaves none of 24 steps"),
        ({"validation_share": 0.9}, "less than or equal to 0.5"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"train": "all"}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_do_not_parse(
    tiny: Any, compress: Compress, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        compress(tiny, CUR, heal(**settings))


def test_mlflow_has_the_curves_in_the_run_of_the_cur_stage(tiny: Any, compress: Compress) -> None:
    compress(tiny, {**CUR, "mlflow": True}, heal(mlflow=True))
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FINISHED"
    metrics = run.data.metrics
    assert metrics["healing_validation_loss_after"] < metrics["healing_validation_loss_before"]
    assert "ratio_targets" in metrics
    history = mlflow.MlflowClient().get_metric_history
    assert [m.step for m in history(run.info.run_id, "healing_training_loss")] == [*range(1, 25)]
    assert len(history(run.info.run_id, "healing_validation_loss")) == 5
    names = {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert {"healing_loss.png", "healing.csv", "layers.csv"} <= names


def test_mlflow_has_a_run_of_its_own_where_the_cur_stage_has_none(
    tiny: Any, compress: Compress
) -> None:
    compress(tiny, CUR, heal(mlflow=True, steps=6))
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FINISHED" and "healing_steps" in run.data.metrics
    assert run.data.params["compress_stage.then_modifiers.CURHealModifier.steps"] == "6"


class Runs:
    """Runs of heal_run.py in one folder, each in a process of its own."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self._folder, self._checkpoint = folder, checkpoint
        self.state = folder / "state" / TrainingState.NAME

    def start(self, name: str, cur: dict[str, Any], **settings: Any) -> subprocess.Popen[bytes]:
        recipe = self._folder / f"{name}.yaml"
        recipe.write_text(recipe_text(cur, heal(**settings)))
        arguments = [self._checkpoint, recipe, self._folder / f"{name}.safetensors"]
        log = (self._folder / f"{name}.log").open("wb")
        script = REPOSITORY / "integration_tests" / "heal_run.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, script, *arguments], stdout=log, stderr=log, env=environment
        )

    def result(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self._folder / f"{name}.safetensors")

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def saved_step(self) -> int:
        if not self.state.exists():
            return 0
        with safe_open(self.state, framework="pt") as file:
            return int(json.loads(file.metadata()["state"])["step"])


@pytest.mark.parametrize("cur", [CUR, ID], ids=["cur", "id"])
def test_a_killed_run_continues_to_the_same_bits(
    tmp_path: Path, tiny_checkpoint: Path, cur: dict[str, Any]
) -> None:
    runs = Runs(tmp_path, tiny_checkpoint)
    settings = {"steps": 60, "patience": 99, "checkpoint_every": 4, "logits_weight": 0.5}
    assert runs.start("whole", cur, **settings).wait(300) == 0, runs.log("whole")

    settings["checkpoint_dir"] = str(runs.state.parent)
    killed = runs.start("killed", cur, **settings)
    while runs.saved_step() < 8 and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    assert 8 <= runs.saved_step() < 60

    assert runs.start("again", cur, **settings).wait(300) == 0, runs.log("again")
    assert "healing continues after step" in runs.log("again")
    whole, again = runs.result("whole"), runs.result("again")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)

    # What is complete is not done again; more steps go on from it; anything else is refused.
    assert runs.start("done", cur, **settings).wait(300) == 0
    assert all(torch.equal(whole[k], v) for k, v in runs.result("done").items())
    assert runs.start("longer", cur, **{**settings, "steps": 66}).wait(300) == 0
    assert runs.saved_step() == 66
    assert runs.start("other", cur, **{**settings, "learning_rate": 0.02}).wait(300) != 0
    assert "setting learning_rate: was 0.01, is 0.02" in runs.log("other")
    rank = {**cur, "rank": {"fixed": 16}}
    assert runs.start("rank", rank, **settings).wait(300) != 0
    assert "rank 32, is" in runs.log("rank") and "delete the folder" in runs.log("rank")
