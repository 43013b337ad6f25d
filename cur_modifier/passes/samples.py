"""Calibration batches: which tokens are real, windows or images in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cur_modifier.checkpoint.files import digest

__all__ = [
    "Sample",
    "collect_samples",
    "first_batches",
    "last_real_token",
    "main_input",
    "real_rows",
    "real_tokens",
    "stacked",
    "with_constant",
]

_LABELS = ("labels", "start_positions", "end_positions")
_NOT_INPUTS = (*_LABELS, "loss_mask")
_MAIN = ("input_ids", "pixel_values")


@dataclass(frozen=True)
class Sample:
    """One window: the model's inputs ``(1, tokens)`` and which of its tokens are real. Or one
    image, which counts as one token."""

    inputs: dict[str, torch.Tensor]
    real: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.real.numel()


def main_input(batch: Mapping[str, Any]) -> torch.Tensor:
    """What a batch is about: its tokens, or its images.

    Raises:
        ValueError: it holds neither.
    """
    found: torch.Tensor | None = next((batch[key] for key in _MAIN if key in batch), None)
    if found is None:
        raise ValueError(
            f"the calibration data have the columns {sorted(batch)}, and none of {list(_MAIN)}. "
            "Name the model's input so."
        )
    return found


def collect_samples(batches: Iterable[Mapping[str, Any]], *, labels: bool = False) -> list[Sample]:
    """The rows of calibration batches, in an order that does not depend on the loader's.

    llm-compressor's loader shuffles with torch's global generator, anew on every pass.

    Args:
        labels: whether to keep labels among the inputs.
    """
    left_out = (
        _NOT_INPUTS if not labels else tuple(key for key in _NOT_INPUTS if key not in _LABELS)
    )
    samples = []
    for batch in batches:
        rows = len(main_input(batch))
        tensors = {
            key: value
            for key, value in batch.items()
            if torch.is_tensor(value) and value.shape[:1] == (rows,) and key not in left_out
        }
        for row in range(rows):
            inputs = {key: value[row : row + 1].clone() for key, value in tensors.items()}
            real = inputs.get("attention_mask", _every_token(main_input(inputs))).bool()
            if real.any():
                samples.append(Sample(inputs, real.reshape(-1)))
    return sorted(samples, key=lambda sample: digest(sample.inputs.values()))


def stacked(samples: Iterable[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    """Neighbouring samples of one shape in batches of at most ``size``."""
    batches: list[list[dict[str, torch.Tensor]]] = []
    for sample in samples:
        last = batches[-1] if batches else []
        if 0 < len(last) < size and _shapes(last[0]) == _shapes(sample):
            last.append(sample)
        else:
            batches.append([sample])
    return [
        {key: torch.cat([each[key] for each in batch]) for key in batch[0]} for batch in batches
    ]


def _shapes(sample: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in sample.items()}


def first_batches(batches: Iterable[Mapping[str, Any]], samples: int) -> list[Mapping[str, Any]]:
    """The leading batches that hold ``samples`` samples, the last one whole."""
    chosen: list[Mapping[str, Any]] = []
    seen = 0
    for batch in batches:
        if seen >= samples:
            break
        chosen.append(batch)
        seen += len(main_input(batch))
    return chosen


def _every_token(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[: 1 if x.ndim > 2 else 2], dtype=torch.bool)


def real_tokens(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """``(samples, tokens)``, False for padding; None where the batch does not say."""
    mask = batch.get("attention_mask")
    return None if mask is None or mask.ndim != 2 else mask.bool()


def real_rows(x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """``x (samples, tokens, n)`` as rows, without those of padding."""
    rows = x.reshape(-1, x.shape[-1])
    # An expert sees a choice of the tokens; where all are real nothing is to be copied.
    if real is None or real.numel() != len(rows) or bool(real.all()):
        return rows
    return rows[real.flatten()]


def with_constant(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``(t, n)`` with a last feature that is always 1."""
    return nn.functional.pad(rows, (0, 1), value=1.0)


def last_real_token(batch: Mapping[str, Any]) -> torch.Tensor:
    """Index ``(samples,)`` of the last token that is not padding, on whichever side padding is."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    positions = torch.arange(ids.shape[-1], device=ids.device)
    return (mask.bool() * positions).argmax(dim=-1)
