"""Files of SQuAD: both versions, and what is none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cur_modifier.tasks.examples import Answer
from cur_modifier.tasks.squad import check_questions, question_of, read_questions
from cur_modifier.tasks.table import TASKS

from .shared import put_squad, real_data


def test_questions_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    put_squad(path, articles=2, unanswerable=True)
    found = read_questions(path)
    assert [question.name for question in found] == [
        "0-3",
        "0-20",
        "0-none",
        "1-3",
        "1-20",
        "1-none",
    ]
    assert found[0].article == "article 0" and found[0].answers == (Answer("w3", 9),)
    assert found[2].answers == ()
    packed = tmp_path / "dev.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_questions(packed) == found


def test_a_row_of_the_hub_is_the_same_question(tmp_path: Path) -> None:
    put_squad(tmp_path / "dev.json", articles=1)
    asked = read_questions(tmp_path / "dev.json")[0]
    row = {"id": asked.name, "title": asked.article, "question": asked.question}
    row |= {"context": asked.context}
    answers = {"text": [asked.answers[0].text], "answer_start": [asked.answers[0].start]}
    assert question_of(row | {"answers": answers}) == asked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the whole file: Invalid JSON"),
        ("[]", "the whole file: .*Give a file such as dev-v1.1.json"),
        ('{"rows": []}', "schema of SQuAD 1.1 or 2.0: data: Field required"),
        (
            json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1"}]}]}]}),
            r"data.0.paragraphs.0.qas.0.question: Field required",
        ),
    ],
)
def test_another_schema_is_said(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "dev.json")


def test_each_version_is_told_from_the_other(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    put_squad(path, articles=2)
    check_questions(TASKS["squad"], read_questions(path), "dev")
    with pytest.raises(ValueError, match=r"dev holds no question without.*task squad\."):
        check_questions(TASKS["squad_v2"], read_questions(path), "dev")
    put_squad(path, articles=2, unanswerable=True)
    check_questions(TASKS["squad_v2"], read_questions(path), "dev")
    with pytest.raises(ValueError, match=r"dev holds 2 questions without.*task squad_v2"):
        check_questions(TASKS["squad"], read_questions(path), "dev")


def test_the_published_file_is_read_whole() -> None:
    found = read_questions(real_data() / "squad" / "xquad.en.json")
    assert len(found) == 1190 and len({question.article for question in found}) == 48
    for question in found:
        [answer] = question.answers
        end = answer.start + len(answer.text)
        assert question.context[answer.start : end] == answer.text
