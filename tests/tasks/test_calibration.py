"""Labelled calibration data, as the model's loss and llm-compressor take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cur_modifier.tasks.calibration import labelled, task_dataset
from cur_modifier.tasks.squad import read_questions
from cur_modifier.tasks.table import TASKS

from .shared import encoder, put_lines, put_squad, real_data, word_tokenizer

pytest.importorskip("datasets")
pytest.importorskip("transformers")
TOKENIZER = word_tokenizer()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"sentence": f"w{i} {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(40)]
    put_lines(tmp_path / "sst2" / "train.jsonl", rows)
    put_lines(tmp_path / "sst2" / "validation.jsonl", [{"sentence": "film", "label": 1}])
    put_squad(tmp_path / "squad" / "train-v1.1.json", articles=8)
    put_squad(tmp_path / "squad" / "dev-v1.1.json", articles=2)
    return tmp_path


def test_rows_are_tokens_with_their_label(data: Path) -> None:
    dataset = task_dataset("sst2", TOKENIZER, data, samples=10)
    assert len(dataset) == 10
    for row in dataset:
        text = TOKENIZER.decode(row["input_ids"])
        assert row["labels"] == [int("good" in text)]
        assert set(row["attention_mask"]) == {1}
    again = task_dataset("sst2", TOKENIZER, data, samples=10)
    assert again["input_ids"] == dataset["input_ids"]
    other = task_dataset("sst2", TOKENIZER, data, samples=10, seed=1)
    assert other["input_ids"] != dataset["input_ids"]


def test_labels_are_the_models_own_numbers(data: Path) -> None:
    model = encoder("ForSequenceClassification", ("positive", "negative"))
    dataset = task_dataset("sst2", TOKENIZER, data, config=model.config, samples=10)
    for row in dataset:
        assert row["labels"] == [int("bad" in TOKENIZER.decode(row["input_ids"]))]


@pytest.mark.parametrize(
    ("task", "head"),
    [("sst2", "ForSequenceClassification"), ("squad", "ForQuestionAnswering")],
)
@pytest.mark.parametrize(("collator", "batch_size"), [("truncation", 1), ("padding", 4)])
def test_llmcompressor_batches_them_and_the_model_has_a_loss(
    task: str, head: str, collator: str, batch_size: int, data: Path
) -> None:
    pytest.importorskip("llmcompressor")
    from llmcompressor.args import DatasetArguments
    from llmcompressor.datasets.utils import get_calibration_dataloader

    dataset = task_dataset(task, TOKENIZER, data, samples=8, max_length=32)
    arguments = DatasetArguments(dataset=dataset, data_collator=collator, batch_size=batch_size)
    model = encoder(head)
    batches = list(get_calibration_dataloader(arguments, TOKENIZER))
    assert len(batches) == 8 // batch_size
    for batch in batches:
        assert torch.isfinite(model(**batch).loss)


def test_scores_are_numbers_with_a_fraction(tmp_path: Path) -> None:
    rows = [{"sentence1": f"w{i}", "sentence2": "good", "label": i / 4} for i in range(20)]
    put_lines(tmp_path / "stsb" / "train.jsonl", rows)
    put_lines(tmp_path / "stsb" / "validation.jsonl", rows[:1])
    dataset = task_dataset("stsb", TOKENIZER, tmp_path, samples=5)
    model = encoder("ForSequenceClassification", ("score",))
    batch = {name: torch.tensor([dataset[0][name]]) for name in dataset.column_names}
    assert batch["labels"].dtype.is_floating_point
    assert torch.isfinite(model(**batch).loss)


def test_a_question_comes_with_the_window_of_its_answer(data: Path) -> None:
    """Its context has 40 words, and a window fewer."""
    task = TASKS["squad"]
    questions = read_questions(data / "squad" / "train-v1.1.json")
    rows = labelled(task, questions, TOKENIZER, max_length=24)
    assert len(rows) == len(questions)
    for row, question in zip(rows, questions, strict=True):
        found = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
        assert TOKENIZER.decode(found) == question.answers[0].text
    every = labelled(task, questions, TOKENIZER, max_length=24, every_window=True)
    assert len(every) > len(rows) and [row for row in every if row in rows] == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sst"}, "no task 'sst'"),
        ({"samples": 41}, r"41 samples are more than sst2 has: 40 \(train.jsonl\). Ask for fewer"),
        ({"config": encoder("ForQuestionAnswering").config}, "needs a class ...ForSequence"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str, data: Path) -> None:
    given: dict[str, Any] = {"name": "sst2", "tokenizer": TOKENIZER, "data": data, **change}
    with pytest.raises(ValueError, match=message):
        task_dataset(**given)


@pytest.mark.parametrize("name", ["sst2", "mrpc", "qnli", "stsb", "squad"])
def test_published_files_make_calibration_data(name: str) -> None:
    dataset = task_dataset(name, TOKENIZER, real_data(), samples=16, max_length=48)
    wanted = {"start_positions", "end_positions"} if name == "squad" else {"labels"}
    assert len(dataset) == 16 and wanted <= set(dataset.column_names)
