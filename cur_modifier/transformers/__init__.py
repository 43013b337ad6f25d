"""Loading factored checkpoints with ``from_pretrained``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from cur_modifier.checkpoint.resized import mark_resized
from cur_modifier.checkpoint.save import wrap_save_pretrained
from cur_modifier.forms.quantizer import CURConfig, CURQuantizer
from cur_modifier.forms.schema import QUANT_METHOD

__all__ = ["CURConfig", "PluginQuantizer", "register"]


class PluginQuantizer(CURQuantizer):
    """The quantizer where the plugin is installed: the loaded model also saves itself whole."""

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_after_weight_loading(model, **kwargs)
        if self.quantization_config.schema.has_own_sizes:
            mark_resized(model)
        wrap_save_pretrained(model)

    def is_serializable(self) -> bool:
        """By the wrapped ``save_pretrained``."""
        return True


def register() -> None:
    """Make the quantizer known to transformers, in place of one that a checkpoint's code
    brought."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = CURConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = PluginQuantizer
