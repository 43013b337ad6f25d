"""Decoder layers, in order."""

from __future__ import annotations

from compressed_tensors.utils import match_named_modules
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import nn

__all__ = ["decoder_layers"]


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers by name, in the order of the model.

    They are the modules that llm-compressor calibrates one after another.

    Raises:
        ValueError: the model names none.
    """
    targets = infer_sequential_targets(model)
    layers = list(match_named_modules(model, [targets] if isinstance(targets, str) else targets))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} names no decoder layers (its `_no_split_modules` match "
            "nothing), so CURModifier can't tell layers apart. Only transformers models are "
            "supported."
        )
    return layers
