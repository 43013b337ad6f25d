"""Every use of what llm-compressor and compressed-tensors do not promise to keep.

`integration_tests/test_upstream.py` fails when one of these changes.
"""

from __future__ import annotations

import re
from typing import Any, Protocol, runtime_checkable

import torch
from compressed_tensors.utils import is_match
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin
from loguru import logger
from torch import nn

__all__ = [
    "ChecksAhead",
    "FollowerLosses",
    "check_later",
    "compresses",
    "followers",
    "group_sizes",
    "matches",
    "modifiers_of_this_pass",
    "preceding",
    "prune_block",
    "recipe_as_given",
    "refuse_distributed",
    "refuse_shared_pass",
    "weight_bits",
]

# Messages of GPTQModifier and SparseGPTModifier before they compress, and of CompressionLogger
# after.
_COMPRESSING = re.compile(
    r"Quantizing \d+ module\(s\): \[(?P<names>.*)\]|Sparsifying (?P<name>\S+) "
)
# Fields that upstream, or a validator, sets on a modifier; nobody writes them into a recipe.
_NOT_GIVEN = ("group", "index", "requires_calibration_data")
_ERROR = re.compile(r"error (?P<loss>\S+)")


def refuse_distributed() -> None:
    """Raises:
    ValueError: several processes calibrate together, each of which would fit other factors.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError(
            f"torch.distributed runs {torch.distributed.get_world_size()} processes, and "
            "CURModifier fits factors in one. Start oneshot without torchrun."
        )


def modifiers_of_this_pass() -> list[Modifier]:
    """The modifiers that share the running calibration pass."""
    return list(active_session().lifecycle.recipe.modifiers)


def refuse_shared_pass(modifier: Modifier) -> None:
    """Raises:
    ValueError: another modifier shares the running calibration pass.
    """
    sharing = [type(m).__name__ for m in modifiers_of_this_pass() if m is not modifier]
    if sharing:
        raise ValueError(
            f"{type(modifier).__name__} shares its calibration pass with {sharing}, which would "
            "calibrate on factors that are not fitted yet. Call oneshot with its default "
            "`pipeline='independent'`."
        )


def followers(modifier: Modifier) -> list[Modifier]:
    """The modifiers that come after ``modifier`` in the recipe being initialized."""
    modifiers = modifiers_of_this_pass()
    for index, other in enumerate(modifiers):
        if other is modifier:
            return modifiers[index + 1 :]
    return []


@runtime_checkable
class ChecksAhead(Protocol):
    """A stage that can say before an earlier stage's work what is wrong with its own."""

    def check_ahead(self, model: nn.Module, batches: Any) -> None:
        """Check model, data and settings.

        Raises:
            ValueError: the stage could not be carried out.
        """


def check_later(modifier: Modifier, model: nn.Module, batches: Any) -> None:
    """Let the stages behind ``modifier`` check themselves on the model as it is.

    llm-compressor initializes one stage after another, so a stage that works while it is
    initialized would work for hours before a mistake in a later one shows.

    Raises:
        ValueError: a later stage could not be carried out.
    """
    for follower in followers(modifier):
        if isinstance(follower, ChecksAhead):
            follower.check_ahead(model, batches)


def preceding(modifier: Modifier) -> list[Modifier]:
    """The modifiers that come before ``modifier`` in the recipe being initialized."""
    modifiers = modifiers_of_this_pass()
    for index, other in enumerate(modifiers):
        if other is modifier:
            return modifiers[:index]
    return []


def matches(modifier: Modifier, name: str, module: nn.Module) -> bool:
    """Whether a quantizing or pruning follower would compress ``module``."""
    ignore = getattr(modifier, "ignore", [])
    if isinstance(modifier, QuantizationMixin):
        return is_match(name, module, modifier.resolved_targets, ignore)
    targets = getattr(modifier, "targets", None)
    if targets is None:
        return False
    return is_match(name, module, targets, ignore)


def compresses(modifier: Modifier) -> bool:
    """Whether a follower quantizes or prunes Linear layers."""
    return isinstance(modifier, QuantizationMixin) or hasattr(modifier, "mask_structure")


def group_sizes(modifier: Modifier, name: str, module: nn.Module) -> list[int]:
    """Group sizes of the schemes by which a follower would quantize ``module``'s weight."""
    if not isinstance(modifier, QuantizationMixin):
        return []
    sizes = []
    for scheme in modifier.resolved_config.config_groups.values():
        size = getattr(scheme.weights, "group_size", None)
        if size and size > 0 and is_match(name, module, scheme.targets, modifier.ignore):
            sizes.append(int(size))
    return sizes


def weight_bits(modifier: Modifier, name: str, module: nn.Module) -> int | None:
    """Bits of the weights after a follower has quantized ``module``, or None if it does not."""
    if not isinstance(modifier, QuantizationMixin):
        return None
    for scheme in modifier.resolved_config.config_groups.values():
        if scheme.weights is not None and is_match(name, module, scheme.targets, modifier.ignore):
            return int(scheme.weights.num_bits)
    return None


def prune_block(modifier: Modifier) -> int:
    """``M`` of a follower's N:M sparsity, or 0."""
    structure = getattr(modifier, "mask_structure", None)
    return int(structure.split(":")[1]) if structure else 0


def recipe_as_given() -> dict[str, Any]:
    """The active recipe with the fields that its author set, in plain types.

    A few that upstream's validators fill in as they parse (GPTQ's ``actorder``, ``observer``) come
    along with the values that were used.

    llm-compressor's own dump of a recipe holds Python enum tags after GPTQ and does not load again.
    """
    recipe = active_session().lifecycle.recipe
    groups: dict[str, dict[str, Any]] = {}
    for modifier in recipe.modifiers:
        name = type(modifier).__name__
        held = modifier.group or recipe.stage
        group, number = f"{held}_modifiers", 1
        while name in groups.get(group, {}):  # of another stage, with a group of the same name
            number += 1
            group = f"{held}_{number}_modifiers"
        fields = modifier.model_dump(mode="json", exclude_unset=True)
        groups.setdefault(group, {})[name] = {
            key: value
            for key, value in fields.items()
            if not key.endswith("_") and key not in _NOT_GIVEN
        }
    return {f"{recipe.stage}_stage": groups}


class FollowerLosses:
    """Collects the loss that GPTQ and SparseGPT log for every module they compress.

    They log "Quantizing 2 module(s): [a, b]" and then, as their contexts close from the last to the
    first, one METRIC record "error x" a module.
    """

    def __init__(self) -> None:
        self.by_module: dict[str, float] = {}
        self._pending: list[str] = []
        self._sink: int | None = logger.add(self._collect, level="INFO", format="{message}")

    def close(self) -> None:
        """Stop listening."""
        if self._sink is not None:
            try:
                logger.remove(self._sink)
            except ValueError:
                logger.debug("the log was reconfigured; no sink is left to remove")
            self._sink = None

    def _collect(self, message: Any) -> None:
        text = message.record["message"]
        if found := _COMPRESSING.match(text):
            names = found["names"]
            self._pending = re.findall(r"'([^']+)'", names) if names else [found["name"]]
        elif self._pending and (found := _ERROR.fullmatch(text)):
            self.by_module[self._pending.pop()] = float(found["loss"])
