"""Gram matrices of many modules, each tensor multiplied once for all that read it."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from cur_modifier.linalg import GramAccumulator
from cur_modifier.passes.samples import real_rows
from cur_modifier.structure.readers import LastRead

__all__ = ["SharedGrams"]


class SharedGrams:
    """Gram matrices by module. q, k and v read one tensor, one after another: it is multiplied
    once, when the next one comes.

    Sums are kept by who read together, so that modules share no more than they have read together:
    the experts of a mixture may read one tensor in one batch and several in the next.
    """

    def __init__(self) -> None:
        self._sums: dict[frozenset[Hashable], GramAccumulator] = {}
        self._last = LastRead()
        self._rows: torch.Tensor | None = None  # of the tensor that was read last
        self._readers: set[Hashable] = set()

    def update(self, module: Hashable, x: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Take what a module reads.

        Args:
            x: ``(..., n)``.
            real: ``(samples, tokens)``, False for padding.
        """
        # A module that reads a tensor twice counts it twice.
        if not self._last.is_again(x) or module in self._readers:
            self._sum_up()
            # A copy: the model may go on to write in place.
            self._rows = real_rows(x.detach(), real).clone()
        self._readers.add(module)

    def next_batch(self) -> None:
        """Let go of the tensor that was read last."""
        self._sum_up()
        self._last.forget()

    def get(self, module: Hashable) -> GramAccumulator | None:
        """What a module has read, or None where no token reached it. One and the same for modules
        that have read nothing apart."""
        self._sum_up()
        own = [gram for readers, gram in self._sums.items() if module in readers]
        if len(own) < 2:
            return own[0] if own else None
        whole = GramAccumulator(own[0].features, device=own[0].device)
        for gram in own:
            whole.add(gram)
        return whole

    def __getitem__(self, module: Hashable) -> GramAccumulator:
        found = self.get(module)
        if found is None:
            raise KeyError(module)
        return found

    def drop(self, module: Hashable) -> None:
        """Let go of a module's Gram matrix, as far as it is no other's."""
        self._sum_up()
        kept: dict[frozenset[Hashable], GramAccumulator] = {}
        for readers, gram in self._sums.items():
            left = readers - {module}
            if left and left in kept:
                kept[left].add(gram)
            elif left:
                kept[left] = gram
        self._sums = kept

    def _sum_up(self) -> None:
        """Multiply the tensor that was read last, now that all who read it are known."""
        if self._rows is None:
            return
        readers = frozenset(self._readers)
        if readers not in self._sums:
            features = self._rows.shape[-1]
            self._sums[readers] = GramAccumulator(features, device=self._rows.device)
        self._sums[readers].update(self._rows)
        self._rows, self._readers = None, set()
