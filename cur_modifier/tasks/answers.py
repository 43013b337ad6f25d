"""From the logits of windows to the text of an answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cur_modifier.tasks.encode import Window
from cur_modifier.tasks.examples import Question

__all__ = ["best_answers", "best_span"]

LONGEST = 30  # tokens of an answer, as in the reference of BERT


def best_span(
    start: torch.Tensor, end: torch.Tensor, allowed: torch.Tensor, longest: int = LONGEST
) -> tuple[float, int, int]:
    """Maximise ``start[i] + end[j]`` over ``i <= j < i + longest`` with both tokens allowed.

    Exact, in ``O(tokens²)``.

    Args:
        start, end: logits ``(tokens,)``.
        allowed: which tokens are of the context ``(tokens,)``.

    Returns:
        The sum, ``i`` and ``j``; minus infinity where no token is allowed.
    """
    blocked = torch.zeros_like(start).masked_fill(~allowed, -torch.inf)
    sums = (start + blocked)[:, None] + (end + blocked)[None, :]
    inside = torch.ones_like(sums, dtype=torch.bool).triu().tril(longest - 1)
    sums = sums.masked_fill(~inside, -torch.inf)
    best = int(sums.argmax())
    return float(sums.flatten()[best]), *divmod(best, len(start))


def best_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    logits: Sequence[tuple[torch.Tensor, ...]],
    *,
    unanswerable: bool,
) -> list[str]:
    """The text of the best span of each question, over its windows.

    Args:
        logits: of each window those of starts and of ends, as long as the window or longer.
        unanswerable: give the empty text where the first token, which stands for no answer, has a
            greater sum in every window than the best span in any, as SQuAD 2.0 does.
    """
    best = [(-torch.inf, "")] * len(questions)
    null = [torch.inf] * len(questions)
    for window, (starts, ends) in zip(windows, logits, strict=True):
        length = len(window.spans)
        allowed = torch.tensor([span is not None for span in window.spans])
        score, first, last = best_span(starts[:length], ends[:length], allowed)
        asked = window.question
        null[asked] = min(null[asked], float(starts[0] + ends[0]))
        if score > best[asked][0]:
            begin, end = window.spans[first], window.spans[last]
            assert begin is not None and end is not None  # only tokens of the context are allowed
            best[asked] = (score, questions[asked].context[begin[0] : end[1]])
    return [
        "" if unanswerable and none > score else text
        for (score, text), none in zip(best, null, strict=True)
    ]
