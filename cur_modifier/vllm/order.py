"""Putting the outputs of a factored Linear in order.

Its products give the outputs in pieces, skeleton first. `CURModifier` puts the neurons of an MLP in
that sequence, and then the pieces need only be laid side by side. Any other order, moved number by
number, costs as much as a third of a product. A compiler makes one loop of it and of what reads the
outputs, and saves the memory traffic. Where nothing is compiled, pairs of 16-bit numbers are moved
as words, which its choice of skeletons allows for: at 256 tokens 3 % of a 2048×2048 product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["in_order", "pairs_of", "runs_of", "side_by_side"]

_WORDS = {2: torch.int32, 4: torch.int64}  # that hold two numbers of so many bytes


# More runs than this are gathered: each is a copy of its own.
_MOST_RUNS = 16


def runs_of(order: torch.Tensor) -> list[tuple[int, int]] | None:
    """The order as half-open ranges of consecutive entries, or None where they are many."""
    breaks = (order.diff() != 1).nonzero().flatten() + 1
    if len(breaks) >= _MOST_RUNS:
        return None
    return [(int(run[0]), int(run[-1]) + 1) for run in order.tensor_split(breaks.tolist())]


def side_by_side(pieces: Sequence[torch.Tensor], runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The outputs ``(…, m)`` made of ranges of the pieces' entries, which count through."""
    found = []
    for start, stop in runs:
        end = 0
        for piece in pieces:
            begin, end = end, end + piece.shape[-1]
            if start < end and begin < stop:
                found.append(piece[..., max(start - begin, 0) : min(stop, end) - begin])
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def pairs_of(order: torch.Tensor, entries: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Which pair of entries each pair of outputs is, or None where pairs do not stay together.

    Args:
        order: which of the ``entries`` that the products give each output is.
    """
    first, second = order[::2], order[1::2]
    if (
        dtype.itemsize not in _WORDS
        or len(order) % 2
        or entries % 2
        or bool((first % 2).any())
        or not torch.equal(second, first + 1)
    ):
        return None
    return first // 2


def in_order(
    pieces: Sequence[torch.Tensor], order: torch.Tensor, pairs: torch.Tensor | None
) -> torch.Tensor:
    """The outputs ``(…, m)`` of pieces that have as many entries together."""
    y = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=-1)
    # Words would end the compiler's loop: it can't go on in another width.
    if pairs is None or torch.compiler.is_compiling():
        return y.gather(-1, order.expand(*y.shape[:-1], -1))
    words = y.view(_WORDS[y.dtype.itemsize])
    return words.gather(-1, pairs.expand(*y.shape[:-1], -1)).view(y.dtype)
