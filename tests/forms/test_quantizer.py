"""The quantizer ``cur``: factored modules take their places before the weights come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cur_modifier.checkpoint.save import wrap_save_pretrained
from cur_modifier.forms.base import factored_layers
from cur_modifier.forms.quantizer import CURConfig, CURQuantizer
from cur_modifier.forms.registry import find_form
from cur_modifier.forms.schema import Schema, SchemaError
from cur_modifier.forms.sizes import FORMS, Shape
from cur_modifier.linalg import Problem

MODULE = "model.layers.0.mlp.up_proj"


def section(**fields: Any) -> dict[str, Any]:
    spec = {"form": "id", "rank": 4, "in_features": 16, "out_features": 24, "bias": False} | fields
    return {"quant_method": "cur", "version": 1, "modules": {fields.pop("name", MODULE): spec}}


def swapped(model: nn.Module, given: dict[str, Any], **kwargs: Any) -> nn.Module:
    CURQuantizer(CURConfig(**given))._process_model_before_weight_loading(model, **kwargs)
    return model


def factor(model: Any, form: str) -> Any:
    """Put factors in the place of the up projection of the first layer."""
    dense = model.get_submodule(MODULE)
    m, n = dense.weight.shape
    layer = find_form(form).build(Shape(m, n, 6), bias=False)
    factors = find_form(form).solve(Problem(W=dense.weight.detach(), rank=6))
    find_form(form).load([layer], factors, [None])
    model.set_submodule(MODULE, layer)
    wrap_save_pretrained(model)
    return model


@pytest.fixture
def empty(small_llama: Callable[..., Any]) -> Any:
    with torch.device("meta"):
        return small_llama(0, num_hidden_layers=1)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_model_is_the_loaded_one(
    small_llama: Callable[..., Any], tmp_path: Path, form: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = factor(small_llama(0, num_hidden_layers=1), form)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert factored_layers(loaded).keys() == {MODULE}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected)


@pytest.mark.parametrize("form", FORMS)
def test_factored_modules_wait_on_meta_for_their_weights(empty: Any, form: str) -> None:
    model = swapped(empty, section(form=form, bias=True), dtype=torch.bfloat16)
    [(name, layer)] = factored_layers(model).items()
    assert name == MODULE and (layer.form, layer.rank) == (form, 4)
    assert layer.effective_bias() is not None
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert all(t.is_meta for t in layer.state_dict().values())


def test_a_leader_is_built_before_those_that_use_its_skeleton(empty: Any) -> None:
    given = section(direct_outputs=1, shared_skeleton="model.layers.0.mlp.gate_proj")
    given["modules"]["model.layers.0.mlp.gate_proj"] = {
        "form": "id",
        "rank": 4,
        "in_features": 16,
        "out_features": 24,
        "direct_outputs": 3,
    }
    mlp = swapped(empty, given).get_submodule("model.layers.0.mlp")
    assert mlp.up_proj.leader is mlp.gate_proj


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "model.layers.7.mlp.up_proj"}, r"layers\.7.* but LlamaForCausalLM has no such"),
        ({"name": "model.norm"}, r"model\.norm is factored; here it is no nn\.Linear"),
        ({"in_features": 15}, r"up_proj is 24x15, but the\s+model builds it as 24x16"),
    ],
)
def test_a_config_of_another_model_is_refused(
    empty: Any, fields: dict[str, Any], message: str
) -> None:
    name = fields.pop("name", MODULE)
    given = section(**fields)
    given["modules"] = {name: given["modules"].pop(MODULE)}
    with pytest.raises(SchemaError, match=message):
        swapped(empty, given)


def test_weights_of_another_checkpoint_are_refused(
    empty: Any, small_llama: Callable[..., Any], tmp_path: Path
) -> None:
    small_llama(0, num_hidden_layers=1).save_pretrained(tmp_path)
    weights = str(tmp_path / "model.safetensors")
    with pytest.raises(
        SchemaError, match=r"model\.layers\.0\.mlp\.up_proj\.id_s\.weight is missing"
    ):
        swapped(empty, section(), checkpoint_files=[weights])
    given = section()
    given["modules"] = {"elsewhere.q": given["modules"][MODULE]}
    with pytest.raises(SchemaError, match=r"none of the 1 modules .* not of one checkpoint"):
        swapped(empty, given, checkpoint_files=[weights])


def test_changed_weights_are_refused(small_llama: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    factor(small_llama(0, num_hidden_layers=1), "id").save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(SchemaError, match="its checksum differs"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_config_is_written_as_it_was_read() -> None:
    given = Schema.read(section()).write()
    config, unused = CURConfig.from_dict(given, return_unused_kwargs=True, dtype="auto")
    assert config.to_dict() == config.to_diff_dict() == given and unused == {"dtype": "auto"}
    assert json.loads(json.dumps(given)) == given
    with pytest.raises(SchemaError, match="schema version 3"):
        CURConfig(**given | {"version": 3})


def test_by_itself_it_loads_and_trains_but_does_not_save() -> None:
    quantizer = CURQuantizer(CURConfig(**section()))
    quantizer.validate_environment()
    assert quantizer.is_trainable and not quantizer.is_serializable()


def test_the_tripwire_is_taken_from_the_config(empty: Any) -> None:
    empty.config.transformers_weights = "this-needs-cur_modifier.safetensors"
    quantizer = CURQuantizer(CURConfig(**section()))
    assert not hasattr(quantizer.update_tp_plan(empty.config), "transformers_weights")
