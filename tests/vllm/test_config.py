from unittest import mock

import torch
from linears import BLOCK, FUSED, WIDTH, Example, refused, sharing
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.models.utils import WeightsMapper

from cur_modifier.forms.schema import DenseSize, ModuleSpec, Schema
from cur_modifier.vllm.config import KEEP_FACTORS, CURQuantizationConfig


def config_of(examples: dict[str, Example]) -> CURQuantizationConfig:
    return CURQuantizationConfig(
        Schema(modules={f"{BLOCK}.{name}": example.spec for name, example in examples.items()})
    )


def test_a_skeleton_of_another_linear_is_refused() -> None:
    config = config_of(sharing({"q_proj": 32, "o_proj": 32}, "q_proj", 20))
    config.packed_modules_mapping = FUSED
    message = f"{BLOCK}.o_proj uses the skeleton of {BLOCK}.q_proj, which vLLM does not run in the"
    with refused(f"{message} same"):
        RowParallelLinear(WIDTH, 32, bias=False, quant_config=config, prefix=f"{BLOCK}.o_proj")


def test_leaders_have_the_names_that_vllm_gives() -> None:
    config = config_of(sharing({"gate_proj": 24, "up_proj": 24}, "up_proj", 20))
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    with mock.patch.object(CURQuantizationConfig, "_check_tensor_parallel"):
        config.apply_vllm_mapper(mapper)
    block = f"language_model.{BLOCK}"
    assert config.modules[f"{block}.gate_proj"].shared_skeleton == f"{block}.up_proj"
    assert config.modules[f"{block}.up_proj"].shared_skeleton is None


def test_a_setting_that_is_neither_true_nor_false_is_refused() -> None:
    config = config_of({"o_proj": Example("id", 40, 2)})
    settings = VllmConfig(additional_config={KEEP_FACTORS: "no"})
    layer = ReplicatedLinear(WIDTH, 40)
    with set_current_vllm_config(settings), refused(KEEP_FACTORS, ValueError):
        config.get_quant_method(layer, f"{BLOCK}.o_proj")


def test_factored_experts_are_refused() -> None:
    spec = ModuleSpec(form="cur", rank=2, in_features=8, out_features=8)
    config = CURQuantizationConfig(Schema(modules={f"{BLOCK}.experts.0.up_proj": spec}))
    with refused("experts.0.up_proj is factored, but vLLM runs it inside"):
        config.get_quant_method(torch.nn.Module(), f"{BLOCK}.experts")


def config_of_resized(name: str) -> CURQuantizationConfig:
    size = DenseSize(out_features=8, in_features=8)
    return CURQuantizationConfig(Schema(modules={}, resized={f"{BLOCK}.{name}": size}))


def test_resized_modules_have_the_names_that_vllm_gives() -> None:
    config = config_of_resized("up_proj")
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    with mock.patch.object(CURQuantizationConfig, "_check_tensor_parallel"):
        config.apply_vllm_mapper(mapper)
    assert config.resized.keys() == {f"language_model.{BLOCK}.up_proj"}


def test_a_resized_module_without_a_linear_is_named() -> None:
    config = config_of_resized("up_proj")
    with refused(f"config.json says that {BLOCK}.up_proj is resized, but the model that vLLM"):
        config.check_claimed()
    config.packed_modules_mapping = {}
    ReplicatedLinear(16, 16, bias=False, quant_config=config, prefix=f"{BLOCK}.up_proj")
    config.check_claimed()


def test_resized_experts_are_refused() -> None:
    config = config_of_resized("experts.0.up_proj")
    with refused("experts.0.up_proj is resized, but vLLM runs it inside"):
        config.get_quant_method(torch.nn.Module(), f"{BLOCK}.experts")


def test_heads_are_refused_where_their_attention_is() -> None:
    config = config_of_resized("o_proj")
    attention = Attention.__new__(Attention)  # its constructor needs the config of a whole model
    with refused(f"{BLOCK}.o_proj: its heads are not those of config.json"):
        config.get_quant_method(attention, f"{BLOCK}.attn")
    assert config.get_quant_method(attention, "model.layers.0.other.attn") is None


def test_other_linears_are_as_ever() -> None:
    config = config_of_resized("up_proj")
    config.packed_modules_mapping = FUSED
    layer = ReplicatedLinear(16, 12, bias=False, quant_config=config, prefix=f"{BLOCK}.o_proj")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert tuple(layer.weight.shape) == (12, 16)
