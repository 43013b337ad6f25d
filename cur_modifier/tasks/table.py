"""Tasks of GLUE and SQuAD: their columns and labels, the head that they need, their metrics.

GLUE: Wang et al. 2018. SQuAD: Rajpurkar et al. 2016 (1.1) and 2018 (2.0).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["TASKS", "Head", "Task", "find_task"]


class Head(StrEnum):
    """The end of a model class's name that says what its last layer gives."""

    CLASSIFICATION = "ForSequenceClassification"
    QUESTION_ANSWERING = "ForQuestionAnswering"

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads such a model."""
        return f"AutoModel{self}"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        scores: names of its metrics; checkpoints are chosen by the first.
        hub: the data set on the hub, and its configuration.
        texts: the columns of an example's texts, each with the names that files have for it.
        label: the names that files have for the column of the label.
        labels: the classes in the order of their numbers; empty where the label is a score.
        train, validation: names of the split's file, besides those that every task may have.
        hub_validation: the hub's name for the split that is public and held out.
        unanswerable: whether the context does not tell the answers of some questions.
    """

    name: str
    head: Head
    scores: tuple[str, ...]
    hub: tuple[str, str | None]
    texts: tuple[tuple[str, ...], ...] = ()
    label: tuple[str, ...] = ("label",)
    labels: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    hub_validation: str = "validation"
    unanswerable: bool = False

    @property
    def outputs(self) -> int:
        """How many numbers the head gives: for a text, or for each token of one."""
        return 2 if self.head is Head.QUESTION_ANSWERING else max(1, len(self.labels))

    @property
    def is_regression(self) -> bool:
        return self.head is Head.CLASSIFICATION and not self.labels


_CLASSES = Head.CLASSIFICATION
_GLUE = "nyu-mll/glue"

TASKS = {
    task.name: task
    for task in (
        Task(
            "sst2",
            _CLASSES,
            ("accuracy",),
            (_GLUE, "sst2"),
            texts=(("sentence",),),
            labels=("negative", "positive"),
            train=("stsa.binary.train",),
        ),
        Task(
            "mrpc",
            _CLASSES,
            ("accuracy", "f1"),
            (_GLUE, "mrpc"),
            texts=(("sentence1", "#1 String"), ("sentence2", "#2 String")),
            label=("label", "Quality"),
            labels=("not_equivalent", "equivalent"),
            train=("msr_paraphrase_train.txt",),
        ),
        Task(
            "qnli",
            _CLASSES,
            ("accuracy",),
            (_GLUE, "qnli"),
            texts=(("question",), ("sentence",)),
            labels=("entailment", "not_entailment"),
        ),
        Task(
            "stsb",
            _CLASSES,
            ("spearman", "pearson"),
            (_GLUE, "stsb"),
            texts=(("sentence1",), ("sentence2",)),
            label=("label", "score"),
            train=("stsb-en-train.csv",),
            validation=("stsb-en-dev.csv",),
        ),
        Task(
            "mnli",
            _CLASSES,
            ("accuracy",),
            (_GLUE, "mnli"),
            texts=(("premise", "sentence1"), ("hypothesis", "sentence2")),
            label=("gold_label", "label"),
            labels=("entailment", "neutral", "contradiction"),
            validation=("validation_matched.jsonl", "dev_matched.tsv"),
            hub_validation="validation_matched",
        ),
        Task(
            "qqp",
            _CLASSES,
            ("accuracy", "f1"),
            (_GLUE, "qqp"),
            texts=(("question1",), ("question2",)),
            label=("label", "is_duplicate"),
            labels=("not_duplicate", "duplicate"),
        ),
        Task(
            "squad",
            Head.QUESTION_ANSWERING,
            ("exact_match", "f1"),
            ("rajpurkar/squad", None),
            train=("train-v1.1.json",),
            validation=("dev-v1.1.json", "xquad.en.json"),
        ),
        Task(
            "squad_v2",
            Head.QUESTION_ANSWERING,
            ("exact_match", "f1"),
            ("rajpurkar/squad_v2", None),
            train=("train-v2.0.json",),
            validation=("dev-v2.0.json",),
            unanswerable=True,
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: there is none, with those that there are.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    raise ValueError(
        f"no task {name!r} of GLUE or SQuAD{f'; near it: {near[0]}' if near else ''}. Name one of "
        f"{', '.join(TASKS)}."
    )
