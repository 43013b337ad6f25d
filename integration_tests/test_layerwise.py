"""Stages that run the layers themselves: targets anchored to the dense model, ranks bought where
the loss needs them, factors trained on their layer's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from small_disk import small_disk
from support import W4A16, Compress
from torch import nn

from cur_modifier.forms.base import FactoredLinear
from cur_modifier.forms.cur import CURLinear
from cur_modifier.forms.row_id import RowIDLinear

SEVEN = {
    "targets": ["re:.*(q|k|v|o|gate|up|down)_proj$"],
    "form": "id",
    "layers": {"select": "all"},
}
BUDGET = {"rank": {"ratio": 0.6, "budget": "sensitivity"}}
REFINE = {"refine": {"epochs": 2, "batch_size": 2, "learning_rate": 1e-3}}


def factored(model: nn.Module) -> dict[str, FactoredLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FactoredLinear)}


@pytest.fixture
def ids(tiny_data: Dataset) -> torch.Tensor:
    return torch.tensor(tiny_data["input_ids"][:])


def fresh(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def test_a_full_disk_costs_the_cache_alone(
    tiny: Any, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    with small_disk(tmp_path, kibibytes=64) as disk:
        monkeypatch.setenv("CUR_MODIFIER_CACHE", str(disk))
        compress(tiny, SEVEN | {"fit": "loss"})
        assert not list(disk.rglob("*.*"))
    assert any("could not be kept" in line for line in log)


def test_the_budget_holds_and_is_read_from_disk_the_second_time(
    tiny_checkpoint: Path, compress: Compress, tmp_path: Path, log: list[str]
) -> None:
    ranks = []
    for _ in range(2):
        model = fresh(tiny_checkpoint)
        before = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("_proj"))
        compress(model, SEVEN | BUDGET | {"fit": "loss", "multiple_of": 8})
        after = sum(
            sum(p.numel() for n, p in m.named_parameters() if n.endswith("weight"))
            for n, m in model.named_modules()
            if n.endswith("_proj")
        )
        assert 0.58 * before < after <= 0.6 * before
        assert all(m.rank % 8 == 0 for m in factored(model).values())
        ranks.append({n: m.rank for n, m in factored(model).items()})
    assert ranks[0] == ranks[1] and len(set(ranks[0].values())) > 3
    assert len(list((tmp_path / "cache" / "sensitivity").glob("*.safetensors"))) == 1
    assert any("sensitivities read from" in line for line in log)


def test_another_model_s_sensitivities_are_refused(
    tiny: Any, tiny_checkpoint: Path, compress: Compress, tmp_path: Path
) -> None:
    stage = SEVEN | BUDGET | {"sensitivity": {"cache": str(tmp_path / "mine.safetensors")}}
    compress(tiny, stage)
    other = fresh(tiny_checkpoint)
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"mine.safetensors holds sensitivities of another model"):
        compress(other, stage)
    with pytest.raises(ValueError, match=r"another settings"):
        compress(fresh(tiny_checkpoint), stage | {"seed": 3})
    (tmp_path / "mine.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"no file of sensitivities"):
        compress(fresh(tiny_checkpoint), stage)


def test_real_rows_and_columns_stay_real_when_the_core_is_trained(
    tiny: Any, compress: Compress
) -> None:
    weights = {n: m.weight.detach().clone() for n, m in tiny.named_modules() if "proj" in n}
    refine = {"refine": {"epochs": 1, "train": "free", "norms": False}}
    compress(tiny, {"layers": {"select": [2, 5]}, "anchor": 0.3, "fit": "loss", **refine})
    modules = factored(tiny)
    assert len(modules) == 6
    for name, module in modules.items():
        assert isinstance(module, CURLinear)
        W = weights[name]
        assert torch.equal(module.cur_r.weight, W[module.rows.long()])
        assert torch.equal(module.cur_c.weight, W[:, module.columns.long()])


def test_the_same_seed_gives_the_same_factors(tiny_checkpoint: Path, compress: Compress) -> None:
    stage = SEVEN | REFINE | {"rank": {"ratio": 0.7}, "layers": {"select": [1, 2]}, "anchor": 0.5}
    states = []
    for _ in range(2):
        model = fresh(tiny_checkpoint)
        compress(model, stage)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_refine_then_quantize_then_load(
    tiny: Any, compress: Compress, ids: torch.Tensor, tmp_path: Path
) -> None:
    stage = SEVEN | REFINE | {"rank": {"ratio": 0.7}, "multiple_of": 32, "anchor": 0.3}
    compress(tiny, stage, W4A16)
    with torch.no_grad():
        before = tiny(ids).logits
    tiny.save_pretrained(tmp_path / "out", save_compressed=True)
    loaded = fresh(tmp_path / "out")
    assert all(hasattr(m, "quantization_scheme") for n, m in loaded.named_modules() if "id_" in n)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, before)


def test_a_refinement_that_diverges_keeps_the_closed_form(
    tiny_checkpoint: Path, compress: Compress, log: list[str]
) -> None:
    stage = SEVEN | {"rank": {"ratio": 0.7}, "layers": {"select": [4]}, "anchor": 0.3}
    closed, wild = fresh(tiny_checkpoint), fresh(tiny_checkpoint)
    compress(closed, stage)
    compress(wild, stage | {"refine": {"epochs": 2, "learning_rate": 1e3}})
    assert any("decoder layer 4 diverged" in line and "closed form is kept" in line for line in log)
    pairs = zip(closed.state_dict().items(), wild.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)


def test_few_tokens_are_said_and_survived(
    tiny: Any, compress: Compress, tiny_data: Dataset, log: list[str]
) -> None:
    few = tiny_data.select([0, 1])
    compress(tiny, SEVEN | {"rank": {"ratio": 0.6}, "anchor": 0.3}, dataset=few)
    assert any("128 tokens calibrate 512 inputs" in line and "8192" in line for line in log)
    assert all(bool(torch.isfinite(p).all()) for p in tiny.parameters())


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"rank": {"fixed": 8, "budget": "sensitivity"}}, "budget 'sensitivity' spends a ratio"),
        ({"anchor": 1.5}, "less than or equal to 1"),
        ({"refine": {"epochs": 0}}, "greater than or equal to 1"),
        (
            {
                **SEVEN,
                "rank": {"ratio": 0.05, "budget": "sensitivity", "least": 0},
                "multiple_of": 64,
            },
            "multiples of 64",
        ),
    ],
)
def test_bad_settings_are_refused(
    tiny: Any, compress: Compress, stage: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        compress(tiny, stage)
    assert not factored(tiny)


def test_no_data_is_refused(tiny: Any, compress: Compress) -> None:
    with pytest.raises(ValueError, match="anchor and refine"):
        compress(tiny, {"anchor": 0.5}, dataset=None)


def test_one_window_can_not_be_refined_on(
    tiny: Any, compress: Compress, tiny_data: Dataset
) -> None:
    with pytest.raises(ValueError, match="1 calibration samples can't be split"):
        compress(tiny, SEVEN | REFINE, dataset=tiny_data.select([0]))
    assert not factored(tiny)


def test_the_anchored_stage_works_where_layers_are_left_dense(
    tiny: Any, compress: Compress
) -> None:
    compress(tiny, SEVEN | {"rank": {"ratio": 0.8}, "layers": {"select": [2, 7]}, "anchor": 0.5})
    assert {n.split(".")[2] for n in factored(tiny)} == {"2", "7"}
    assert all(isinstance(m, RowIDLinear) for m in factored(tiny).values())
