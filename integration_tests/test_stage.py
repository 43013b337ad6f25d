"""What a stage does to a tiny model, in every form, and that it does it again the same way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import ROUND_TO_NEAREST, Compress
from torch import nn
from transformers import AutoModelForCausalLM

from cur_modifier.forms.base import FactoredLinear
from cur_modifier.forms.cur import CURLinear
from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.linalg import Score, Selection

ALL = {"layers": {"select": "all"}}
IDS = torch.arange(40, 72)[None]


def factored_modules(model: nn.Module) -> dict[str, FactoredLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FactoredLinear)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("selection", list(Selection))
@pytest.mark.parametrize("form", ["cur", "id"])
def test_every_selection(tiny: Any, compress: Compress, form: str, selection: str) -> None:
    cur = {"form": form, "selection": str(selection), "rank": {"fixed": 48}}
    dense = {n: m.weight.detach().clone() for n, m in tiny.named_modules() if n.endswith("q_proj")}
    compress(tiny, {**cur, "layers": {"select": [4]}})
    modules = factored_modules(tiny)
    assert len(modules) == 3
    q_proj = modules["model.layers.4.self_attn.q_proj"]
    weight = dense["model.layers.4.self_attn.q_proj"]
    if isinstance(q_proj, CURLinear):
        assert torch.equal(q_proj.cur_r.weight, weight[q_proj.rows.long()])
        assert torch.equal(q_proj.cur_c.weight, weight[:, q_proj.columns.long()])
    else:
        assert isinstance(q_proj, RowIDLinear)
        rows = torch.argsort(q_proj.order)[: q_proj.rank]
        assert torch.equal(q_proj.id_s.weight, weight[rows])


@pytest.mark.parametrize("score", list(Score))
@pytest.mark.parametrize("fit", ["gram", "diag", "weight"])
def test_every_score_and_fit(tiny: Any, compress: Compress, score: str, fit: str) -> None:
    cur = {"scores": str(score), "fit": fit, "rank": {"fixed": 48}, "layers": {"select": [4]}}
    compress(tiny, cur)
    assert torch.isfinite(logits(tiny)).all()


@pytest.mark.parametrize("form", ["cur", "id"])
def test_nearly_full_rank_changes_nothing(
    tiny: Any, compress: Compress, form: str, tiny_checkpoint: Any
) -> None:
    # k_proj is 128 x 256: rank 128 is exact for CUR; a row ID stops one short of it.
    rank = 128 if form == "cur" else 127
    targets = ["re:.*k_proj$"]
    compress(tiny, {"form": form, "targets": targets, "rank": {"fixed": rank}, **ALL})
    dense = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    torch.testing.assert_close(logits(tiny), logits(dense), atol=2e-2, rtol=0)


def test_the_bias_is_kept(tiny: Any, compress: Compress) -> None:
    bias = tiny.model.layers[4].self_attn.q_proj.bias.detach().clone()
    compress(tiny, {"form": "id", "rank": {"ratio": 0.7}, "layers": {"select": [4]}})
    assert torch.equal(tiny.model.layers[4].self_attn.q_proj.effective_bias(), bias)


def test_the_same_seed_gives_the_same_model(
    tiny: Any, compress: Compress, tiny_checkpoint: Any
) -> None:
    cur = {
        "selection": "leverage_sampled",
        "rank": {"fixed": 32},
        "layers": {"select": "random", "count": 4},
    }
    again = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    other = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    # The data loader shuffles; a fixed order leaves the seed of the stage as the only randomness.
    for model, seed in ((tiny, 3), (again, 3), (other, 4)):
        compress(model, {**cur, "seed": seed}, shuffle_calibration_samples=False)
    assert factored_modules(tiny).keys() == factored_modules(again).keys()
    assert torch.equal(logits(tiny), logits(again))
    assert not torch.equal(logits(tiny), logits(other))


def test_angular_takes_the_flattest_layers(tiny: Any, compress: Compress) -> None:
    for index in (3, 7):  # layers that add almost nothing turn the hidden state least
        tiny.model.layers[index].self_attn.o_proj.weight.data *= 1e-3
        tiny.model.layers[index].self_attn.o_proj.bias.data *= 1e-3
        tiny.model.layers[index].mlp.down_proj.weight.data *= 1e-3
    compress(tiny, {"rank": {"fixed": 32}, "layers": {"select": "angular", "count": 2}})
    assert {name.split(".")[2] for name in factored_modules(tiny)} == {"3", "7"}


def test_sensitivity_takes_the_layers_that_cost_least(tiny: Any, compress: Compress) -> None:
    """Weights of the rank that they get cost nothing, in the first layer as in any."""
    for index in (0, 7):
        layer = tiny.model.layers[index]
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj):
            left, right = torch.randn(linear.out_features, 8), torch.randn(8, linear.in_features)
            linear.weight.data = left @ right / 100
    compress(tiny, {"rank": {"fixed": 32}, "layers": {"select": "sensitivity", "count": 2}})
    assert {name.split(".")[2] for name in factored_modules(tiny)} == {"0", "7"}


def test_ratio_is_kept_everything_counted(tiny: Any, compress: Compress) -> None:
    before = {n: p.numel() for n, p in tiny.named_parameters()}
    targets = ["re:.*(q|k|v|o|gate|up|down)_proj$"]
    compress(tiny, {"form": "id", "targets": targets, "rank": {"ratio": 0.6}, **ALL})
    for name, module in factored_modules(tiny).items():
        stored = sum(p.numel() for p in module.parameters())
        dense = before[f"{name}.weight"] + before.get(f"{name}.bias", 0)
        assert stored <= 0.6 * dense


def test_energy_leaves_a_flat_spectrum_dense(tiny: Any, compress: Compress, log: list[str]) -> None:
    compress(tiny, {"rank": {"energy": 0.99}, "layers": {"select": [4]}})
    assert factored_modules(tiny) == {}
    assert len([line for line in log if "stays dense" in line]) == 3


def test_energy_takes_what_is_needed(tiny: Any, compress: Compress) -> None:
    q_proj = tiny.model.layers[4].self_attn.q_proj
    with torch.no_grad():
        U, _, V = torch.linalg.svd(q_proj.weight)
        spectrum = torch.zeros(256)
        spectrum[:20] = 1.0
        q_proj.weight.copy_(U @ torch.diag(spectrum) @ V)
    cur = {"targets": ["re:.*q_proj$"], "fit": "weight", "rank": {"energy": 0.999}}
    compress(tiny, {**cur, "multiple_of": 8, "layers": {"select": [4]}})
    assert factored_modules(tiny)["model.layers.4.self_attn.q_proj"].rank == 24


def test_two_stages_on_different_modules(tiny: Any, compress: Compress) -> None:
    first = {"targets": ["re:.*q_proj$"], "rank": {"fixed": 32}, **ALL, "mlflow": False}
    second = {"targets": ["re:.*gate_proj$"], "form": "id", "rank": {"ratio": 0.7}, **ALL}
    compress(tiny, second, recipe_first={"CURModifier": first})
    kinds = {type(m).__name__ for m in factored_modules(tiny).values()}
    assert kinds == {"CURLinear", "RowIDLinear"} and len(factored_modules(tiny)) == 26


def test_rounding_stacks_too(tiny: Any, compress: Compress) -> None:
    compress(tiny, {"rank": {"fixed": 32}, **ALL}, ROUND_TO_NEAREST)
    for module in factored_modules(tiny).values():
        for factor in module.factors.values():
            assert factor.quantization_scheme.weights.num_bits == 4
