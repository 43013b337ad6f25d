"""Passes through a model that is pruned from the front: masks at ones, layers that are settled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cur_modifier.passes.context import frozen, replaced_forward
from cur_modifier.passes.samples import real_rows, real_tokens
from cur_modifier.structure.removal import Units

__all__ = ["Batch", "Masks", "ReachedError", "Settled", "inputs_of", "masks_of"]

Batch = Mapping[str, torch.Tensor]


class ReachedError(Exception):
    """Leaves a forward pass where nothing further is needed of it."""


def inputs_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Without the labels, whose loss nobody asks for."""
    return {key: value for key, value in batch.items() if key != "labels"}


class Settled:
    """Hidden states behind the layers that are pruned already, so that no pass runs them again."""

    def __init__(self, model: Any, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = batches
        self._done: list[nn.Module] = []
        self._hidden: list[torch.Tensor] = []

    @torch.no_grad()
    def settle(self, layer: str) -> None:
        """Keep what the layer, which changes no more, gives for each batch."""
        module = self._model.get_submodule(layer)
        hidden: list[torch.Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            hidden.append(out[0] if isinstance(out, tuple) else out)
            raise ReachedError

        handle = module.register_forward_hook(hook)
        try:
            for number, batch in enumerate(self._batches):
                with self.passing(number), suppress(ReachedError):
                    self._model(**inputs_of(batch))
        finally:
            handle.remove()
        self._done.append(module)
        self._hidden = hidden

    @contextmanager
    def passing(self, number: int) -> Iterator[None]:
        """Settled layers hand on what they gave for a batch."""
        with ExitStack() as stack:
            for module in self._done:
                stack.enter_context(replaced_forward(module, lambda *_, **__: self._hidden[number]))
            yield


@dataclass(frozen=True)
class Masks:
    """What a mask over the units of each sub-layer tells, by the consumer's name.

    Attributes:
        gradients: ``(samples, units)``, of each sample's loss at a mask of ones.
        blocks: ``(units, w, w)``, second moments of what each unit gives the consumer.
    """

    gradients: dict[str, torch.Tensor]
    blocks: dict[str, torch.Tensor]


def masks_of(
    model: Any,
    units: Sequence[Units],
    batches: Sequence[Batch],
    loss: Callable[[Any, Batch, int], torch.Tensor],
    settled: Settled,
) -> Masks:
    """One pass of gradients at masks of ones.

    Args:
        loss: summed over a batch's samples, of the outputs, the batch and its number.
    """
    found: dict[str, list[torch.Tensor]] = {each.consumer: [] for each in units}
    sums: dict[str, torch.Tensor] = {}
    masks: dict[str, torch.Tensor] = {}
    real: torch.Tensor | None = None
    tokens = 0

    def masking(each: Units) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            h, name = args[0], each.consumer
            rows = real_rows(h.detach(), real)[:, each.reads]
            block = torch.einsum("tuv,tuw->uvw", rows, rows).double()
            sums[name] = sums[name] + block if name in sums else block
            masks[name] = h.new_ones(len(h), 1, h.shape[-1], requires_grad=True)
            return (h * masks[name], *args[1:])

        return hook

    with ExitStack() as stack:
        stack.enter_context(frozen(model.eval()))
        for each in units:
            module = model.get_submodule(each.consumer)
            stack.callback(module.register_forward_pre_hook(masking(each)).remove)
        for number, batch in enumerate(batches):
            real = real_tokens(batch)
            tokens += batch["input_ids"].numel() if real is None else int(real.sum())
            with settled.passing(number):
                total = loss(model(**batch), batch, number)
            gradients = torch.autograd.grad(total, [masks[each.consumer] for each in units])
            for each, gradient in zip(units, gradients, strict=True):
                found[each.consumer].append(gradient[:, 0, each.reads].sum(-1))
    return Masks(
        {name: torch.cat(parts).double() for name, parts in found.items()},
        {name: total / tokens for name, total in sums.items()},
    )
