"""What the two engines that fit a stage's modules have in common.

:class:`~.hooks.HookEngine` looks on while llm-compressor's sequential pipeline runs the compressed
model; :class:`~.layerwise.LayerwiseEngine` runs the layers itself, dense beside compressed.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

__all__ = ["Engine"]


class Engine(Protocol):
    """Fits the modules that are installed, in the events of one calibration pass.

    Attributes:
        needs_pipeline: whether llm-compressor is to run its sequential pipeline over the data.
    """

    needs_pipeline: bool

    def start(self, model: nn.Module, batches: Any) -> None:
        """The calibration begins."""

    def layer_done(self, modules: list[nn.Module]) -> None:
        """These modules have seen all of their data."""

    def unfitted(self) -> list[str]:
        """Names of the candidates that have no factors yet."""
