"""Whether a model fits a task is known from its config."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cur_modifier.tasks.heads import check_model, head_of, label_order
from cur_modifier.tasks.table import TASKS, Head


def config(architecture: str, labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")) -> Any:
    return SimpleNamespace(
        architectures=[architecture] if architecture else None,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
    )


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("BertForSequenceClassification", Head.CLASSIFICATION),
        ("LlamaForSequenceClassification", Head.CLASSIFICATION),
        ("BertForQuestionAnswering", Head.QUESTION_ANSWERING),
        ("BertForMaskedLM", None),
        ("LlamaForCausalLM", None),
        ("", None),
    ],
)
def test_the_head_is_in_the_name(architecture: str, head: Head | None) -> None:
    assert head_of(config(architecture)) is head


def test_labels_are_found_by_their_names() -> None:
    """Models number the labels of MNLI in several ways."""
    mnli = TASKS["mnli"]
    other = config("XForSequenceClassification", ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    assert label_order(mnli, other) == [2, 1, 0]
    assert label_order(TASKS["qnli"], config("X", ("not entailment", "Entailment"))) == [1, 0]
    assert label_order(TASKS["sst2"], config("X")) == [0, 1]
    assert label_order(TASKS["stsb"], config("X", ("score",))) == [0]


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (
            "sst2",
            config("BertModel"),
            "m is BertModel, and sst2 needs a class ...ForSequence.*finetune",
        ),
        ("sst2", config(""), "m is a model without architectures in config.json"),
        ("sst2", config("BertForQuestionAnswering"), "needs a class ...ForSequenceClassification"),
        ("squad", config("BertForSequenceClassification"), "needs a class ...ForQuestionAnswering"),
        (
            "mnli",
            config("BertForSequenceClassification"),
            r"m has 2 labels \(LABEL_0, LABEL_1\), and mnli has 3 \(entailment, .*trained on mnli",
        ),
        ("stsb", config("BertForSequenceClassification"), r"stsb has 1 \(a score\)"),
        (
            "sst2",
            config("BertForSequenceClassification", ("up", "down")),
            "m calls its labels up, down, .*negative, positive can't be known. Write .*id2label",
        ),
    ],
)
def test_what_does_not_fit_is_said(task: str, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(TASKS[task], given, "m")


def test_what_fits_passes() -> None:
    check_model(TASKS["sst2"], config("BertForSequenceClassification"), "m")
    check_model(TASKS["squad"], config("BertForQuestionAnswering"), "m")
    check_model(TASKS["stsb"], config("BertForSequenceClassification", ("score",)), "m")
