"""Rows become examples, whatever their columns and labels are called."""

from __future__ import annotations

from typing import Any

import pytest

from cur_modifier.tasks.examples import Answer, Example, Question, example_of
from cur_modifier.tasks.table import TASKS


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("sst2", {"sentence": "good", "label": 1}, Example(("good",), 1)),
        ("sst2", {"sentence": "good", "label": "positive"}, Example(("good",), 1)),
        ("mrpc", {"#1 String": "a", "#2 String": "b", "Quality": "0"}, Example(("a", "b"), 0)),
        (
            "qnli",
            {"question": "a", "sentence": "b", "label": "not_entailment"},
            Example(("a", "b"), 1),
        ),
        ("stsb", {"sentence1": "a", "sentence2": "b", "score": "3.25"}, Example(("a", "b"), 3.25)),
        (
            "mnli",
            {"sentence1": "a", "sentence2": "b", "label1": "x", "gold_label": "neutral"},
            Example(("a", "b"), 1),
        ),
        ("qqp", {"question1": "a", "question2": "b", "is_duplicate": "1"}, Example(("a", "b"), 1)),
    ],
)
def test_columns_of_the_hub_and_of_the_authors(
    task: str, row: dict[str, Any], expected: Example
) -> None:
    assert example_of(TASKS[task], row, "here") == expected


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sst2", {"text": "x", "label": 1}, "here: no column sentence, only text, label. Give"),
        ("sst2", {"sentence": None, "label": 1}, "here: None is no text"),
        ("sst2", {"sentence": "x", "label": 2}, r"the label 2 is none of sst2, .*0 \(negative\)"),
        ("sst2", {"sentence": "x", "label": -1}, "Test sets are published without labels"),
        ("sst2", {"sentence": "x", "label": 0.5}, "the label 0.5 is none"),
        ("sst2", {"sentence": "x", "label": None}, "the label None is none"),
        ("stsb", {"sentence1": "x", "sentence2": "y", "score": "6"}, "which are 0 to 5"),
        ("stsb", {"sentence1": "x", "sentence2": "y", "score": "nan"}, "which are 0 to 5"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        example_of(TASKS[task], row, "here")


def test_one_pair_has_one_identity() -> None:
    """GLUE tokenized the pairs of MRPC, which the original has as they were written."""
    first = Example(("It doesn't fit.", "No"), 1)
    assert first.identity == Example(("No", "it doesn 't fit ."), 0).identity
    assert first.identity != Example(("It does fit.", "No"), 1).identity


def test_questions_about_an_article_are_one_group() -> None:
    def asked(question: str, article: str) -> Question:
        return Question("1", article, question, "context", (Answer("con", 0),))

    assert asked("what", "A").group == asked("who", "A").group != asked("what", "B").group
    assert asked("what", "").group == "context"
    assert asked("what", "A").identity != asked("who", "A").identity
