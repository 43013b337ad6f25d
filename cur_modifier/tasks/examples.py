"""Examples of tasks: texts with a label, or a question about a context."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cur_modifier.tasks.table import Task

__all__ = ["Answer", "Example", "Question", "example_of"]

STSB_HIGHEST = 5.0  # a score of similarity lies between 0 and this


@dataclass(frozen=True)
class Example:
    """One or two texts, and the number of their class or their score."""

    texts: tuple[str, ...]
    label: int | float

    @property
    def group(self) -> str:
        """Examples that share it lie in one part where a file is split: QNLI asks several questions
        about one sentence."""
        return self.texts[-1]

    @property
    def identity(self) -> frozenset[str]:
        """Equal for the same texts in either order, whatever spaces a tokenizer has put in."""
        return frozenset(_letters(text) for text in self.texts)


@dataclass(frozen=True)
class Answer:
    """A part of the context, and the character where it starts."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question about a context. Without answers, the context does not tell."""

    name: str
    article: str
    question: str
    context: str
    answers: tuple[Answer, ...]

    @property
    def group(self) -> str:
        """Questions about one article lie in one part."""
        return self.article or self.context

    @property
    def identity(self) -> frozenset[str]:
        return frozenset({_letters(self.question), _letters(self.context)})


def example_of(task: Task, row: Mapping[str, Any], where: str) -> Example:
    """A row of a file or of the hub as an example.

    Args:
        where: the file and its line, for the message.

    Raises:
        ValueError: a column is missing, a text is none, a label is none of the task's.
    """
    texts = tuple(_value(row, names, where) for names in task.texts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where}: {text!r} is no text.")
    return Example(texts, _label(task, _value(row, task.label, where), where))


def _value(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(
        f"{where}: no column {' or '.join(names)}, only {', '.join(map(str, row))}. Give the file "
        "as its authors publish it, or with the columns that the hub has."
    )


def _label(task: Task, given: Any, where: str) -> int | float:
    if task.labels and given in task.labels:
        return task.labels.index(given)
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = -1.0
    if task.is_regression and 0 <= number <= STSB_HIGHEST:
        return number
    if number in range(len(task.labels)):
        return int(number)
    wanted = (
        ", ".join(f"{number} ({name})" for number, name in enumerate(task.labels))
        if task.labels
        else f"0 to {STSB_HIGHEST:g}"
    )
    raise ValueError(
        f"{where}: the label {given!r} is none of {task.name}, which are {wanted}. Test sets are "
        "published without labels: give the validation set."
    )


def _letters(text: str) -> str:
    return re.sub(r"\W", "", text).lower()
