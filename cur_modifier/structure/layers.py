"""Decoder layers, in order."""

from __future__ import annotations

from compressed_tensors.utils import match_named_modules
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import nn

__all__ = ["decoder_layers"]


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers by name, in the order of the model.

    They are the modules that llm-compressor calibrates one after another; where the model names
    none of them, as DistilBERT, its longest list of modules of one class.

    Raises:
        ValueError: the model has neither.
    """
    targets = infer_sequential_targets(model)
    layers = list(match_named_modules(model, [targets] if isinstance(targets, str) else targets))
    # Encoders name their embeddings as well, which are no layer of a list.
    layers = [item for item in layers if item[0].rpartition(".")[2].isdigit()] or layers
    if not layers:
        layers = _longest_list(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} names no layers (its `_no_split_modules` match nothing, and "
            "it has no list of modules of one class), so they can't be told apart. Only "
            "transformers models are supported."
        )
    return layers


def _longest_list(model: nn.Module) -> list[tuple[str, nn.Module]]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    if not lists:
        return []
    name, longest = max(lists, key=lambda item: len(item[1]))
    return [(f"{name}.{index}", child) for index, child in enumerate(longest)]
