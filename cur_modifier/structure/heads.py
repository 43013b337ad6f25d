"""How the heads of attention may lie in the outputs of its projections.

A unit is a key/value head with the query heads that read it: without one of them attention goes on
with the others as before, and every group stays as large as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["Layout", "head_layouts"]


class Layout(NamedTuple):
    """Features by unit: ``(units, k)`` of each projection's outputs, ``(units, w)`` of what the
    output projection reads."""

    outputs: list[torch.Tensor]
    inputs: torch.Tensor


def head_layouts(config: Any, outputs: Sequence[int], inputs: int) -> Iterator[Layout]:
    """Layouts that fit projections of these sizes, as the config of the text model counts heads.

    Three projections hold blocks of queries, keys and values. One that is fused holds all queries,
    then all keys, then all values (GPT-2, Phi-3); or the queries of a group with its key and value,
    group after group (GPT-NeoX, Falcon).

    Args:
        outputs: of one projection or of three.
        inputs: of the output projection, which reads one block for each query head.
    """
    text = config.get_text_config()
    heads: int = getattr(text, "num_attention_heads", None) or 0
    groups: int = getattr(text, "num_key_value_heads", None) or heads
    if not heads or heads % groups or inputs % heads:
        return
    width = inputs // heads
    read = _blocks(0, inputs, groups)
    sizes = [inputs, groups * width, groups * width]
    if list(outputs) == sizes:
        yield Layout([_blocks(0, size, groups) for size in sizes], read)
    if list(outputs) == [sum(sizes)]:
        starts = [0, sizes[0], sizes[0] + sizes[1]]
        parts = [_blocks(at, size, groups) for at, size in zip(starts, sizes, strict=True)]
        yield Layout([torch.cat(parts, dim=1)], read)
        yield Layout([_blocks(0, sum(sizes), groups)], read)


def _blocks(start: int, size: int, groups: int) -> torch.Tensor:
    return torch.arange(start, start + size).view(groups, -1)
