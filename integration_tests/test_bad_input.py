"""Every bad input gets an error: the value, the reason and the remedy, before any calibration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support import W4A16, Compress

from cur_modifier.passes.survey import survey as real_survey

ALL = {"layers": {"select": "all"}}
GROUP_128 = {
    "GPTQModifier": {
        "targets": ["Linear"],
        "ignore": ["lm_head"],
        "scheme": "W4A16",
    }
}


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran on data: empty as long as nothing slow has begun."""
    ran: list[str] = []

    def watching(*args: Any, **kwargs: Any) -> Any:
        ran.append("survey")
        return real_survey(*args, **kwargs)

    monkeypatch.setattr("cur_modifier.modifiers.cur.plan.survey", watching)
    return ran


@pytest.mark.parametrize(
    ("cur", "then", "message"),
    [
        ({"targets": ["re:.*nothing$"]}, None, "matches no Linear.*Linears there: down_proj"),
        ({"targets": ["lm_head"], **ALL}, None, "matches no Linear inside the decoder layers"),
        ({"ignore": ["re:.*_proj$"], **ALL}, None, "nothing is left to factor"),
        ({"rank": {"fixed": 300}, **ALL}, None, r"rank 300 is above 256 \(min"),
        ({"form": "id", "rank": {"fixed": 128}, **ALL}, None, "rank 128 is above 127.*row ID"),
        ({"rank": {"ratio": 0.001}, **ALL}, None, "ratio 0.001.*no rank >= 1"),
        ({"rank": {"ratio": 0.3}, "multiple_of": 128, **ALL}, None, "a multiple of 128"),
        ({"rank": {"fixed": 50}, "multiple_of": 32, **ALL}, None, "not a multiple of"),
        ({"layers": {"count": 12}}, None, "layers.count is 12, but the model has 11"),
        (
            {"targets": ["re:.*layers.[57].*q_proj$"], "layers": {"count": 3}},
            None,
            "layers.count is 3, but the targets match modules in 2 of the layers",
        ),
        ({"layers": {"select": [3, 13]}}, None, r"holds \[13\].*layers 0 to 12"),
        ({"rank": {"fixed": 48}, **ALL}, W4A16, "48 inputs, group_size 32.*multiple_of"),
        ({"rank": {"fixed": 16}, **ALL}, W4A16, "16 inputs, group_size 32"),
        ({"rank": {"energy": 0.9}, "multiple_of": 16, **ALL}, W4A16, "16 inputs, group_size 32"),
        ({"rank": {"fixed": 64}, **ALL}, GROUP_128, "64 inputs, group_size 128"),
        (
            {"rank": {"fixed": 30}, **ALL},
            {"SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4"}},
            "30 inputs, sparsity blocks of 4",
        ),
        (
            {"rank": {"fixed": 32}, **ALL},
            {"CURModifier": {"rank": {"fixed": 16}, "mlflow": False, **ALL}},
            "already factored by an earlier CURModifier",
        ),
    ],
)
def test_refused_before_calibration(
    tiny: Any,
    compress: Compress,
    calibrated: list[str],
    cur: dict[str, Any],
    then: dict[str, Any] | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        compress(tiny, cur, then)
    assert calibrated == []


@pytest.mark.parametrize(
    ("cur", "message"),
    [
        ({"rank": {"ratio": 1.2}}, r"1.2 is outside \(0, 1\]"),
        ({"rank": {"ratio": 0}}, r"outside \(0, 1\]"),
        ({"rank": {"ratio": 0.5, "max": 3}}, "exactly one of fixed, max, ratio, energy"),
        ({"rank": {}}, "exactly one"),
        ({"scores": "wandda"}, "'wanda', 'gram', 'diag' or 'weight'"),
        ({"selection": "best"}, "'deim', 'qdeim'"),
        ({"form": "svd"}, "no form 'svd'; choose cur, id"),
        ({"fit": "hessian"}, "'gram', 'diag' or 'weight'"),
        ({"form": "id", "scores": "gram"}, "scores 'gram' guide a selection"),
        (
            {"selection": "greedy", "scores": "wanda"},
            "scores 'wanda' mean nothing to selection 'greedy'",
        ),
        ({"layers": {"select": "first"}}, "unknown layer selection 'first'"),
        ({"layers": {"select": "all", "count": 3}}, "count 3 has no meaning"),
        (
            {"layers": {"select": "sensitivity"}, "rank": {"energy": 0.9}},
            "energy 0.9 gives ranks after the layers are known",
        ),
        ({"target": ["q_proj"]}, "Extra inputs are not permitted"),
        ({"targets": []}, "at least 1 item"),
    ],
)
def test_recipe_that_does_not_parse(
    tiny: Any, compress: Compress, cur: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        compress(tiny, cur)


@pytest.mark.parametrize(
    "cur",
    [{"layers": {"select": "angular", "count": 3}, "fit": "weight", "scores": "weight"}, ALL],
)
def test_no_calibration_data(tiny: Any, compress: Compress, cur: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no calibration data, but .* need it.*dataset="):
        compress(tiny, cur, dataset=None)


def test_data_free_stage_needs_no_data(tiny: Any, compress: Compress) -> None:
    compress(tiny, {"fit": "weight", "scores": "weight", **ALL}, dataset=None)
    assert type(tiny.model.layers[0].self_attn.q_proj).__name__ == "CURLinear"


def test_infinite_weight_names_the_module(tiny: Any, compress: Compress) -> None:
    tiny.model.layers[4].mlp.gate_proj.weight.data[3, 5] = float("inf")
    with pytest.raises(ValueError, match=r"layers.4.mlp.gate_proj.weight contains NaN or infinity"):
        compress(tiny, ALL)


def test_infinite_activations_name_the_module(tiny: Any, compress: Compress) -> None:
    tiny.model.layers[4].input_layernorm.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match=r"layers.4.self_attn.q_proj: .*NaN or infinity"):
        compress(tiny, ALL)


def test_infinite_hidden_state_names_the_layer(tiny: Any, compress: Compress) -> None:
    tiny.model.layers[4].mlp.down_proj.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="decoder layer 4 produces NaN or infinity"):
        compress(tiny, {})


def test_sequential_pipeline_with_a_follower(tiny: Any, compress: Compress) -> None:
    cur = {"rank": {"fixed": 64}, **ALL}
    with pytest.raises(ValueError, match=r"shares its calibration pass with.*GPTQModifier"):
        compress(tiny, cur, W4A16, pipeline="sequential")


def test_sequential_pipeline_alone_is_fine(tiny: Any, compress: Compress) -> None:
    compress(tiny, {"rank": {"fixed": 64}, **ALL}, pipeline="sequential")


def test_quantized_before_factored(tiny: Any, compress: Compress) -> None:
    cur = {"rank": {"fixed": 32}, **ALL}
    rounding = {"scheme": "W8A8", "targets": ["Linear"], "ignore": ["lm_head"]}
    with pytest.raises(ValueError, match=r"already quantized.*Factor first"):
        compress(tiny, {**cur}, recipe_first={"QuantizationModifier": rounding})


def test_follower_that_misses_the_factors_is_told(
    tiny: Any, compress: Compress, log: list[str]
) -> None:
    rounding = {"scheme": "W8A8", "targets": ["re:.*q_proj$", "re:.*v_proj$"]}
    compress(tiny, {"rank": {"fixed": 32}, **ALL}, {"QuantizationModifier": rounding})
    (warning,) = [line for line in log if "leaves their factors alone" in line]
    assert "cur_r/cur_u/cur_c" in warning and "_proj.*" in warning


def test_unfitted_model_is_not_saved(tiny: Any, compress: Compress, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"shares its calibration pass"):
        compress(tiny, {"rank": {"fixed": 64}, **ALL}, W4A16, pipeline="sequential")
    with pytest.raises(ValueError, match="the compression did not finish"):
        tiny.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_module_outside_the_calibration_is_named(tiny: Any, compress: Compress) -> None:
    layer = tiny.model.layers[2].self_attn
    layer.register_module("spare_proj", torch.nn.Linear(256, 256))
    with pytest.raises(ValueError, match=r"spare_proj: no token reached|never ran"):
        compress(tiny, {"targets": ["re:.*spare_proj$"], **ALL})
