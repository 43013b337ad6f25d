"""The best span, against trying all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.tasks.answers import best_answers, best_span
from cur_modifier.tasks.encode import Window
from cur_modifier.tasks.examples import Question


@given(length=st.integers(1, 12), longest=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_the_best_span_is_the_best_of_all(length: int, longest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, length, generator=generator, dtype=torch.float64)
    allowed = torch.rand(length, generator=generator) < 0.7
    tried = [
        (float(start[i] + end[j]), i, j)
        for i in range(length)
        for j in range(i, min(i + longest, length))
        if allowed[i] and allowed[j]
    ]
    found = best_span(start, end, allowed, longest)
    if tried:
        assert found == max(tried)
    else:
        assert found[0] == -math.inf


def asked() -> tuple[list[Question], list[Window]]:
    """One question about two words, each in a window of its own."""
    question = Question("q", "", "which?", "one two", ())
    return [question], [Window({}, 0, [None, (0, 3)]), Window({}, 0, [None, (4, 7)])]


def logits(none: float, word: float) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor([none, word, 99.0])  # the last is padding, which no window has
    return both, both


def test_the_best_window_has_the_answer() -> None:
    questions, parts = asked()
    found = best_answers(questions, parts, [logits(5.0, 1.0), logits(0.0, 2.0)], unanswerable=False)
    assert found == ["two"]


@pytest.mark.parametrize(("none", "expected"), [((5.0, 2.5), ""), ((5.0, 1.5), "two")])
def test_no_answer_has_to_win_in_every_window(none: tuple[float, float], expected: str) -> None:
    questions, parts = asked()
    rows = [logits(none[0], 1.0), logits(none[1], 2.0)]
    assert best_answers(questions, parts, rows, unanswerable=True) == [expected]
    assert best_answers(questions, parts, rows, unanswerable=False) == ["two"]
