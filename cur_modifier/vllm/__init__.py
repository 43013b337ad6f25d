"""Serving factored checkpoints with ``vllm serve``: the entry point ``vllm.general_plugins``."""

from __future__ import annotations

from cur_modifier.forms.schema import QUANT_METHOD

__all__ = ["register"]


def register() -> None:
    """Make the quantization method ``cur`` known to vLLM.

    vLLM calls this in each of its processes, and more than once in some.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from cur_modifier.vllm.config import CURQuantizationConfig

    register_quantization_config(QUANT_METHOD)(CURQuantizationConfig)
