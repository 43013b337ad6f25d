"""Texts as tokens: nothing of a context is lost, and answers are where they are said to be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.tasks.encode import answer_position, encode_examples, longest_input, windows
from cur_modifier.tasks.examples import Answer, Example, Question

from .shared import word_tokenizer

pytest.importorskip("transformers")
TOKENIZER = word_tokenizer()


def asked(words: int, answer: int, length: int = 1, question: str = "the ?") -> Question:
    """A question about a row of words, whose answer is ``length`` of them."""
    context = " ".join(f"w{number}" for number in range(words))
    start = context.index(f"w{answer}")
    text = " ".join(f"w{answer + i}" for i in range(length))
    return Question("q", "", question, context, (Answer(text, start),))


def test_one_text_and_two() -> None:
    [single] = encode_examples([Example(("good film",), 1)], TOKENIZER, 64)
    assert TOKENIZER.decode(single["input_ids"]) == "[CLS] good film [SEP]"
    pairs = [Example(("good", "bad"), 1), Example(("a " * 50, "the " * 50), 0)]
    first, second = encode_examples(pairs, TOKENIZER, 20)
    assert TOKENIZER.decode(first["input_ids"]) == "[CLS] good [SEP] bad [SEP]"
    assert first["token_type_ids"] == [0, 0, 0, 1, 1]
    assert len(second["input_ids"]) == 20


def test_the_longest_input_is_the_shorter_that_is_said() -> None:
    def said(tokenizer: int | None, config: int | None) -> int:
        return longest_input(
            SimpleNamespace(model_max_length=tokenizer),
            SimpleNamespace(max_position_embeddings=config),
        )

    assert said(512, 1024) == said(1024, 512) == said(10**30, 512) == 512
    assert said(256, None) == 256
    assert said(10**30, None) == 512


@given(words=st.integers(1, 80), data=st.data())
def test_windows_hold_all_of_a_context_and_its_answer(words: int, data: st.DataObject) -> None:
    answer = data.draw(st.integers(0, words - 1))
    length = data.draw(st.integers(1, min(3, words - answer)))
    question = asked(words, answer, length)
    parts = windows([question], TOKENIZER, max_length=24, stride=8)
    covered = {i for part in parts for span in part.spans if span for i in range(*span)}
    letters = {i for i, letter in enumerate(question.context) if letter != " "}
    assert covered == letters
    positions = [(part, answer_position(part, question)) for part in parts]
    held = [(part, first, last) for part, (first, last) in positions if first]
    assert held  # the stride is longer than the answer, so one window has it whole
    for part, first, last in held:
        begin, end = part.spans[first], part.spans[last]
        assert begin is not None and end is not None
        assert question.context[begin[0] : end[1]] == question.answers[0].text


def test_a_long_question_leaves_room_for_the_context() -> None:
    question = asked(40, 30, question="the film " * 60)
    parts = windows([question], TOKENIZER, max_length=24, stride=4)
    assert all(len(part.inputs["input_ids"]) <= 24 for part in parts)
    assert any(answer_position(part, question)[0] for part in parts)


def test_a_question_without_an_answer_points_at_the_first_token() -> None:
    question = Question("q", "", "the ?", "w1 w2", ())
    [part] = windows([question], TOKENIZER, max_length=24, stride=8)
    assert answer_position(part, question) == (0, 0)


def test_an_answer_that_is_not_there_is_said() -> None:
    question = Question("q7", "", "the ?", "w1 w2", (Answer("w9", 0),))
    [part] = windows([question], TOKENIZER, max_length=24, stride=8)
    with pytest.raises(ValueError, match=r"question q7: the context has 'w1' at character 0, not"):
        answer_position(part, question)


def test_a_tokenizer_without_spans_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SimpleNamespace does not tell.*tokenizer.json"):
        windows([asked(3, 1)], SimpleNamespace(is_fast=False), max_length=24, stride=8)
