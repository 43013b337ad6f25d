"""Examples as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cur_modifier.tasks.examples import Example, Question

__all__ = ["Window", "answer_position", "encode_examples", "longest_input", "windows"]

Inputs = dict[str, list[int]]
_LONG = 512  # of models that don't say what they take


def longest_input(tokenizer: Any, config: Any) -> int:
    """The most tokens that a model takes."""
    said = (
        getattr(tokenizer, "model_max_length", None),
        getattr(config, "max_position_embeddings", None),
    )
    # A tokenizer that does not know says 10^30.
    return min([length for length in said if length and length < 10**9], default=_LONG)


def encode_examples(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Inputs]:
    """Token ids of one or two texts each, cut at ``max_length``, not padded."""
    columns = [list(texts) for texts in zip(*(example.texts for example in examples), strict=True)]
    return _rows(tokenizer(*columns, truncation=True, max_length=max_length))


@dataclass(frozen=True)
class Window:
    """A question with a part of its context that fits into the model.

    Attributes:
        inputs: token ids and what goes with them.
        question: which question, by its number.
        spans: of each token the characters ``(start, end)`` of the context that it stands for; None
            for tokens that are not of the context.
    """

    inputs: Inputs
    question: int
    spans: list[tuple[int, int] | None]


def windows(
    questions: Sequence[Question], tokenizer: Any, *, max_length: int, stride: int
) -> list[Window]:
    """Every question with its whole context, in as many windows as it takes.

    Questions are cut at half a window, so that there is room for context.

    Args:
        stride: tokens of the context that neighbouring windows share.

    Raises:
        ValueError: a tokenizer that does not know which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, which "
            "answers need. Save a tokenizer of the library tokenizers (tokenizer.json) with the "
            "model."
        )
    encoded = tokenizer(
        [_cut(question.question.strip(), tokenizer, max_length // 2) for question in questions],
        [question.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    numbers = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    found = []
    for row, inputs in enumerate(_rows(encoded)):
        parts = encoded.sequence_ids(row)
        spans = [
            tuple(span) if part == 1 else None
            for part, span in zip(parts, offsets[row], strict=True)
        ]
        found.append(Window(inputs, numbers[row], spans))
    return found


def answer_position(window: Window, question: Question) -> tuple[int, int]:
    """The first and the last token of the answer; twice the first token of all where the window
    does not hold it.

    Raises:
        ValueError: the answer does not stand in the context where it is said to.
    """
    if not question.answers:
        return 0, 0
    answer = question.answers[0]
    end = answer.start + len(answer.text)
    if question.context[answer.start : end] != answer.text:
        raise ValueError(
            f"question {question.name}: the context has {question.context[answer.start : end]!r} "
            f"at character {answer.start}, not the answer {answer.text!r}. Correct its "
            "answer_start."
        )
    tokens = [
        index
        for index, span in enumerate(window.spans)
        if span and span[0] < end and span[1] > answer.start
    ]
    whole = tokens and (
        window.spans[tokens[0]][0] <= answer.start  # type: ignore[index]
        and window.spans[tokens[-1]][1] >= end  # type: ignore[index]
    )
    return (tokens[0], tokens[-1]) if whole else (0, 0)


def _cut(text: str, tokenizer: Any, tokens: int) -> str:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = found["offset_mapping"]
    return text if len(spans) <= tokens else text[: spans[tokens - 1][1]]


def _rows(encoded: Any) -> list[Inputs]:
    return [
        {name: encoded[name][row] for name in encoded} for row in range(len(encoded["input_ids"]))
    ]
