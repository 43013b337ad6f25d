"""Fitting behind llm-compressor's sequential pipeline, by hooks that gather second moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cur_modifier.modifiers.cur.fitting import Fitting, named
from cur_modifier.modifiers.cur.install import Installed, onload
from cur_modifier.passes.grams import SharedGrams

__all__ = ["HookEngine"]


class HookEngine:
    """An :class:`~.engine.Engine`. A layer is fitted when the pipeline has run all data through it;
    the layers after it then see its compressed output.

    Args:
        register_hook: llm-compressor's, of the stage, which also removes what it registers.
    """

    def __init__(
        self, installed: Sequence[Installed], fitting: Fitting, register_hook: Callable[..., Any]
    ) -> None:
        self._pending = list(installed)
        self._fitting = fitting
        self._register_hook = register_hook
        self._grams = SharedGrams()
        self.needs_pipeline = fitting.plan.settings.needs_activations

    def start(self, model: nn.Module, batches: Any) -> None:
        onload(self._pending)
        if self.needs_pipeline:
            for each in self._pending:
                self._register_hook(each.first, self._observe, "forward_pre")

    def layer_done(self, modules: list[nn.Module]) -> None:
        self._grams.next_batch()
        done = set(modules)
        reading: dict[object, list[Installed]] = {}  # by the tensor that they read
        for each in self._pending:
            if each.last in done:
                # Without activations there is nothing to tell them apart by, and no need to.
                reading.setdefault(self._grams.get(each.first), []).append(each)
        for group in reading.values():
            self._fit(group)

    def unfitted(self) -> list[str]:
        return [each.candidate.name for each in self._pending]

    def _observe(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._grams.update(module, args[0])

    def _fit(self, group: Sequence[Installed]) -> None:
        """Fit candidates that read one tensor to what the hooks saw of it."""
        second_moment, first = None, group[0]
        if self.needs_pipeline:
            gram = self._grams.get(first.first)
            if gram is None:
                raise ValueError(
                    f"{first.candidate.name}: no token reached this module. Calibrate with "
                    "inputs that reach it, or put it on `ignore`"
                )
            with named(first.candidate.name):
                second_moment = gram.second_moment()
            names = [name for each in group for name in each.containers]
            second_moment = self._fitting.regularized(names, second_moment, gram.tokens)
        self._fitting.fit(group, second_moment)
        for each in group:
            self._pending.remove(each)
            self._grams.drop(each.first)
