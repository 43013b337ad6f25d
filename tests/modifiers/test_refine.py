"""Training a layer's factors on its output: better on held-out windows, or left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.forms.base import Surroundings
from cur_modifier.forms.cur import CURLinear
from cur_modifier.linalg import cur
from cur_modifier.modifiers.config import RefineConfig
from cur_modifier.modifiers.cur.layerwise import _parts
from cur_modifier.modifiers.refine import refine_layer
from cur_modifier.passes.context import frozen
from cur_modifier.passes.streams import LayerStreams

NAMES = ("self_attn.v_proj", "mlp.up_proj")


class Setting:
    """The first layer of the model, with two modules as CUR."""

    def __init__(self, model: Any, batches: Sequence[Any]) -> None:
        device = torch.device("cpu")
        plain = [batch | {"use_cache": False} for batch in batches]
        self.model = model
        self.streams = LayerStreams(model, list(model.model.layers), plain, device)
        self.outputs, _, _ = self.streams.run_dense({}, keep_inputs=False)
        self.containers: dict[str, CURLinear] = {}
        self.around: dict[str, Surroundings] = {}
        for name in NAMES:
            W = self.streams.layer.get_submodule(name).weight.detach()
            rows, columns = torch.arange(4), torch.arange(4)
            self.containers[name] = CURLinear.from_factors(cur(W, rows, columns))
            self.streams.layer.set_submodule(name, self.containers[name])
            m, n = W.shape
            self.around[name] = Surroundings(torch.eye(n).double(), torch.ones(m).double())

    def refine(self, **fields: Any) -> Any:
        config = RefineConfig(**{"epochs": 3, "batch_size": 2} | fields)
        with frozen(self.model):
            return refine_layer(
                self.streams,
                self.outputs,
                _parts(self.containers, self.around, config),
                torch.eye(16).double(),
                config,
                seed=0,
            )

    def weights(self) -> dict[str, torch.Tensor]:
        state = self.streams.layer.state_dict()
        return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture
def setting(model: Any, batches: Any) -> Setting:
    return Setting(model, batches)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_what_is_kept_is_better_on_windows_that_were_held_out(setting: Setting) -> None:
    before = setting.weights()
    result = setting.refine()
    assert result.kept and result.after < result.before
    assert len(result.train) == 3 * 3  # 8 windows, one of them held out, two a step
    moved = changed(before, setting.weights())
    factors = {f"{name}.cur_{factor}.weight" for name in NAMES for factor in "ruc"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert moved == factors | norms


def test_free_factors_alone_keep_rows_and_columns_real(setting: Setting) -> None:
    before = setting.weights()
    assert setting.refine(train="free", norms=False).kept
    assert changed(before, setting.weights()) == {f"{name}.cur_u.weight" for name in NAMES}


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_diverges_leaves_the_fit(setting: Setting, logged: list[str]) -> None:
    before = setting.weights()
    result = setting.refine(learning_rate=1e4, epochs=1)
    assert not result.kept and result.after == result.before
    assert changed(before, setting.weights()) == set()
    [warning] = [m for m in logged if "diverged" in m]
    assert "decoder layer 0" in warning and "Lower `refine.learning_rate`" in warning


def test_a_layer_without_error_gains_nothing(model: Any, batches: Any) -> None:
    setting = Setting(model, batches)
    setting.outputs = [
        setting.streams.forward(batch.compressed, index).detach()
        for index, batch in enumerate(setting.streams.batches)
    ]
    before = setting.weights()
    result = setting.refine(epochs=1)
    assert result.before == 0 and not result.kept
    assert changed(before, setting.weights()) == set()


def test_the_same_seed_gives_the_same_factors(
    small_llama: Callable[..., Any], batches: Any
) -> None:
    one, other = (Setting(small_llama(0, num_hidden_layers=1), batches) for _ in range(2))
    assert one.refine().train == other.refine().train
    assert changed(one.weights(), other.weights()) == set()


def test_nothing_of_the_training_is_left_in_the_modules(setting: Setting) -> None:
    setting.refine()
    for module in setting.streams.layer.modules():
        assert all(isinstance(p, nn.Parameter) and p.grad is None for p in module.parameters())
