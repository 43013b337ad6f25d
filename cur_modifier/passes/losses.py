"""The loss whose curvature is measured, for every head that a model may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cur_modifier.passes.samples import main_input

__all__ = ["drawn_loss"]


def drawn_loss(
    outputs: Any, inputs: Mapping[str, Any], generator: torch.Generator, problem: str | None = None
) -> torch.Tensor:
    """The summed loss of a batch, with the batch's labels or with labels drawn from the model.

    Drawn from the model's own distribution they give the true Fisher information, which asks
    nothing of the data. Where the batch has labels it is that of the task's loss: the empirical
    Fisher information.

    What is drawn follows the outputs: classes of tokens (a language model, tagging) or of samples,
    as of images,
    the two ends of a span (question answering), a normal variable around a single number
    (regression), or around every feature of the last hidden state (a model without head).

    Args:
        outputs: of the model.
        inputs: of the batch: its padding counts for nothing, its ``labels`` may give the loss.
        problem: the config's ``problem_type``.

    Raises:
        ValueError: outputs of no kind that is known, by their names.
    """
    given = getattr(outputs, "loss", None)
    if given is not None:  # a mean over samples
        total: torch.Tensor = given * len(main_input(inputs))
        return total
    mask = inputs.get("attention_mask")
    start, end = (getattr(outputs, f"{end}_logits", None) for end in ("start", "end"))
    if start is not None and end is not None:
        return _classes(start, None, generator) + _classes(end, None, generator)
    logits = getattr(outputs, "logits", None)
    if logits is None:
        hidden = getattr(outputs, "last_hidden_state", None)
        if hidden is None:
            raise ValueError(
                f"the model answers {list(outputs)}, of which none is logits or a hidden state, so "
                "its loss's curvature can't be measured. Write `fit: gram` and a uniform budget."
            )
        return _around(hidden, mask, generator)
    if problem == "regression" or logits.shape[-1] == 1:
        return _around(logits, None, generator)
    if problem == "multi_label_classification":
        drawn = torch.rand(logits.shape, generator=generator).to(logits.device)
        labels = (drawn < logits.detach().float().sigmoid()).float()
        return nn.functional.binary_cross_entropy_with_logits(
            logits.float(), labels, reduction="sum"
        )
    return _classes(logits, mask if logits.ndim == 3 else None, generator)


def _classes(
    logits: torch.Tensor, mask: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    flat = logits.flatten(0, -2).float()
    drawn = torch.rand(flat.shape[0], 1, generator=generator).to(flat.device)
    with torch.no_grad():
        labels = (flat.softmax(-1).cumsum(-1) < drawn).sum(-1).clamp(max=flat.shape[-1] - 1)
    losses = nn.functional.cross_entropy(flat, labels, reduction="none")
    return losses.sum() if mask is None else (losses * mask.flatten()).sum()


def _around(
    mean: torch.Tensor, mask: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """``½ ‖y − mean‖²`` of a ``y`` that is normal around the mean: its gradient is the noise."""
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    missed = (mean.detach() + noise - mean).float().square() / 2
    return missed.sum() if mask is None else (missed * mask[..., None]).sum()
