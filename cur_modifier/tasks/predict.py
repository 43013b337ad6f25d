"""A model's outputs on inputs of many lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

__all__ = ["predict"]


@torch.no_grad()
def predict(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[dict[str, list[int]]],
    *,
    outputs: Sequence[str],
    batch_size: int,
    description: str,
) -> list[tuple[torch.Tensor, ...]]:
    """The named outputs of each input, in float32 on the CPU, in the order of the inputs.

    Batches hold inputs of about one length, the longest first: little is padding, and what does not
    fit into memory fails at once.

    Args:
        outputs: fields of what the model returns, such as ``logits``. Those of tokens are as long
            as the batch: padding included.

    Raises:
        ValueError: an output is not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]["input_ids"]), reverse=True)
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    with tqdm(total=len(inputs), desc=description, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            padded = tokenizer.pad([inputs[index] for index in batch], return_tensors="pt")
            answer = model(**padded.to(device))
            columns = [answer[name].float().cpu() for name in outputs]
            if not all(column.isfinite().all() for column in columns):
                raise ValueError(
                    f"{description}: the model's {' and '.join(outputs)} are not finite: it "
                    "produces NaN or infinity. Check its weights and dtype."
                )
            found |= zip(batch, zip(*columns, strict=True), strict=True)
            bar.update(len(batch))
    return [found[index] for index in range(len(inputs))]
