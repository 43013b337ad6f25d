"""The contexts of our own passes through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading, set_onload_device
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import (
    DisableQuantization,
    disable_cache,
    disable_hf_kernels,
    disable_lm_head,
    eval_context,
)
from torch import nn

__all__ = ["evaluation_forward", "frozen", "on_device", "replaced_forward", "trial"]


@contextmanager
def evaluation_forward(model: nn.Module, *, logits: bool) -> Iterator[torch.device]:
    """The context of our own passes through a model in evaluation mode; gives their device.

    Quantization that a later stage has prepared is off: its scales are not there yet. Without
    ``logits`` the head is left out. Unlike in upstream's own passes the model keeps its attention,
    which is several times faster than the eager one on long windows.
    """
    with ExitStack() as stack:
        if torch.accelerator.is_available():
            set_onload_device(model, get_main_device())
            device = get_main_device()
        else:
            device = torch.device("cpu")
        stack.enter_context(disable_cache(model))
        stack.enter_context(eval_context(model))
        stack.enter_context(disable_hf_kernels(model))
        stack.enter_context(DisableQuantization(model))
        if not logits:
            stack.enter_context(disable_lm_head(model))
        yield device


@contextmanager
def trial(
    model: Any, inputs: Mapping[str, torch.Tensor] | None = None
) -> Iterator[Callable[[], None]]:
    """Gives a forward pass of ``inputs``, or of the few tokens that transformers keeps for that,
    whatever they say.

    Without gradients and, of tokens, without logits; modules can be called again inside the context
    as they were.
    """
    whole = inputs is not None
    inputs = inputs or model.dummy_inputs
    with evaluation_forward(model, logits=whole) as device, torch.no_grad():
        yield lambda: model(**on_device(inputs, device))


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch whose tensors are on ``device``."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` asks for a gradient inside."""
    with disable_onloading():  # copies of offloaded ones would be others, and all there at once
        asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` with another forward, hooks and all.

    What stood on the instance stands there again afterwards, and nothing else: restoring a bound
    method as an attribute would hide the class's own from then on.
    """
    instance = vars(module)
    before = instance.get("forward")
    instance["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del instance["forward"]
        else:
            instance["forward"] = before
