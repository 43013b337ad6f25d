"""One Gram matrix for all modules that read one tensor."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from cur_modifier.linalg import GramAccumulator
from cur_modifier.passes.samples import real_rows
from cur_modifier.structure.readers import LastRead

__all__ = ["SharedGrams"]


class SharedGrams:
    """Gram matrices by module. Those of q, k and v are one, summed once: they read one tensor, one
    after another."""

    def __init__(self) -> None:
        self._by_module: dict[Hashable, GramAccumulator] = {}
        self._last = LastRead()
        self._of_last: GramAccumulator | None = None

    def update(self, module: Hashable, x: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Take what a module reads.

        Args:
            x: ``(..., n)``.
            real: ``(samples, tokens)``, False for padding.
        """
        again, own = self._last.is_again(x), self._by_module.get(module)
        if again and own in (None, self._of_last):
            assert self._of_last is not None
            self._by_module[module] = self._of_last
            return
        if own is None:
            own = self._by_module[module] = GramAccumulator(x.shape[-1], device=x.device)
        own.update(real_rows(x, real))
        self._of_last = own

    def next_batch(self) -> None:
        """Let go of the tensor that was read last."""
        self._last.forget()

    def get(self, module: Hashable) -> GramAccumulator | None:
        """What a module has read, or None where no token reached it."""
        return self._by_module.get(module)

    def __getitem__(self, module: Hashable) -> GramAccumulator:
        return self._by_module[module]

    def drop(self, module: Hashable) -> None:
        """Let go of a module's Gram matrix."""
        self._by_module.pop(module, None)
