"""Decoder layers, and blocks of convolutions, in order."""

from __future__ import annotations

from compressed_tensors.utils import match_named_modules
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import nn

__all__ = ["below", "convolution_blocks", "decoder_layers"]


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


def convolution_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of convolutions by name, in the order of the model.

    They are the members of the innermost lists whose members all have one class and hold several
    convolutions, as the residual blocks of a ResNet's stages. A model without such lists, a plain
    chain, is one layer as a whole: its name is empty. A chain in parts, each an ``nn.Sequential``,
    is a chain.
    """
    lists = {
        name: [(f"{name}.{key}", child) for key, child in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and _are_blocks(module)
    }
    inner = [n for n in lists if not any(other.startswith(below(n)) for other in lists)]
    return [item for name in inner for item in lists[name]] or [("", model)]


def below(layer: str) -> str:
    """What the names of all modules inside a layer begin with; nothing for the model itself."""
    return f"{layer}." if layer else ""


def _are_blocks(modules: nn.Module) -> bool:
    members = list(modules.children())
    convolutions = [sum(isinstance(m, nn.Conv2d) for m in each.modules()) for each in members]
    classes = {type(member) for member in members}
    return len(classes) == 1 and nn.Sequential not in classes and min(convolutions) > 1


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
