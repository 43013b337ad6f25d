from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

from cur_modifier.vllm import register
from cur_modifier.vllm.config import CURQuantizationConfig


def test_registered_once_however_often() -> None:
    register()
    register()
    assert get_quantization_config("cur") is CURQuantizationConfig
    assert QUANTIZATION_METHODS.count("cur") == 1
