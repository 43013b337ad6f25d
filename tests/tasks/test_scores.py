"""Metrics by their definitions, and by what they do not depend on."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.tasks.examples import Answer, Question
from cur_modifier.tasks.scores import score_answers, score_labels
from cur_modifier.tasks.table import TASKS

pytest.importorskip("sklearn")
LABELS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)


def values(task: str, found: list[float], given_labels: list[float]) -> dict[str, float]:
    return {s.name: s.value for s in score_labels(TASKS[task], found, given_labels)}


@given(pairs=LABELS)
def test_accuracy_and_f1_by_counting(pairs: list[tuple[int, int]]) -> None:
    found, labels = (list(column) for column in zip(*pairs, strict=True))
    accuracy, f1 = score_labels(TASKS["mrpc"], found, labels)
    right = sum(a == b for a, b in pairs) / len(pairs)
    assert accuracy.value == pytest.approx(right)
    assert accuracy.stderr == pytest.approx(math.sqrt(right * (1 - right) / (len(pairs) - 1)))
    hits, wrong = pairs.count((1, 1)), pairs.count((1, 0)) + pairs.count((0, 1))
    assert f1.value == pytest.approx(2 * hits / (2 * hits + wrong) if hits else 0.0)


def test_correlations_do_not_depend_on_scale_nor_ranks_on_shape() -> None:
    labels = [0.0, 1.0, 2.5, 4.0, 5.0]
    line = values("stsb", [3 * x - 7 for x in labels], labels)
    assert line == pytest.approx({"spearman": 1.0, "pearson": 1.0})
    curve = values("stsb", [-math.exp(x) for x in labels], labels)
    assert curve["spearman"] == pytest.approx(-1.0) and curve["pearson"] > -0.9
    assert values("stsb", [1.0] * 5, labels) == {"spearman": 0.0, "pearson": 0.0}


def test_one_example_has_no_standard_error() -> None:
    [score] = score_labels(TASKS["sst2"], [1], [1])
    assert (score.value, score.stderr) == (1.0, None)


@pytest.mark.parametrize(
    ("said", "answers", "exact", "f1"),
    [
        ("The Panthers!", ["panthers"], 1.0, 1.0),
        ("two  of the starters", ["Two of starters."], 1.0, 1.0),
        ("Carolina Panthers", ["Denver Broncos", "Panthers"], 0.0, 2 / 3),
        ("", ["Panthers"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("Panthers", [], 0.0, 0.0),
        ("in 1998", ["1998", "in 1998"], 1.0, 1.0),
    ],
)
def test_answers_are_compared_as_the_official_script_does(
    said: str, answers: list[str], exact: float, f1: float
) -> None:
    pytest.importorskip("transformers")
    question = Question("q", "", "?", "", tuple(Answer(text, 0) for text in answers))
    found = {score.name: score.value for score in score_answers([question], [said])}
    assert found == pytest.approx({"exact_match": exact, "f1": f1})


def test_answers_are_averaged_with_their_error() -> None:
    pytest.importorskip("transformers")
    questions = [Question("q", "", "?", "", (Answer("one", 0),))] * 4
    exact, _ = score_answers(questions, ["one", "one", "two", "one"])
    assert exact.value == 0.75 and exact.stderr == pytest.approx(0.25)
