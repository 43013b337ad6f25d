"""Questions of SQuAD's JSON files, and of the hub's rows."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cur_modifier.tasks.examples import Answer, Question
from cur_modifier.tasks.table import Task

__all__ = ["check_questions", "question_of", "read_questions"]


class _Answer(BaseModel):
    text: str
    answer_start: int


class _Question(BaseModel):
    id: str
    question: str
    answers: list[_Answer]


class _Paragraph(BaseModel):
    context: str
    qas: list[_Question]


class _Article(BaseModel):
    title: str = ""
    paragraphs: list[_Paragraph]


class _File(BaseModel):
    data: list[_Article]


def read_questions(path: Path) -> list[Question]:
    """The questions of a file in the schema of SQuAD 1.1 and 2.0, in its order.

    Raises:
        ValueError: the file has another schema, with the place and what is wrong there.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read()
    try:
        articles = _File.model_validate_json(content).data
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise ValueError(
            f"{path} has not the schema of SQuAD 1.1 or 2.0: {place}: {first['msg']}. Give a file "
            "such as dev-v1.1.json: data, paragraphs, context, qas, answers with text and "
            "answer_start."
        ) from None
    return [
        Question(
            asked.id,
            article.title,
            asked.question,
            paragraph.context,
            tuple(Answer(answer.text, answer.answer_start) for answer in asked.answers),
        )
        for article in articles
        for paragraph in article.paragraphs
        for asked in paragraph.qas
    ]


def question_of(row: Mapping[str, Any]) -> Question:
    """A row of the data set on the hub."""
    answers = row["answers"]
    return Question(
        row["id"],
        row["title"],
        row["question"],
        row["context"],
        tuple(map(Answer, answers["text"], answers["answer_start"])),
    )


def check_questions(task: Task, questions: list[Question], where: str) -> None:
    """Make sure that the questions are of the version that the task names.

    Raises:
        ValueError: SQuAD 1.1 with questions that have no answer, 2.0 without such.
    """
    without = sum(not question.answers for question in questions)
    if without and not task.unanswerable:
        raise ValueError(
            f"{where} holds {without} questions without an answer, which SQuAD 1.1 has not. Ask "
            "for task squad_v2."
        )
    if task.unanswerable and not without:
        raise ValueError(
            f"{where} holds no question without an answer, as SQuAD 2.0 does. Ask for task squad."
        )
