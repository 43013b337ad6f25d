"""Splits: what is held out stays held out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.tasks.examples import Example
from cur_modifier.tasks.load import Split, split_by_group, training_split, validation_split
from cur_modifier.tasks.table import TASKS

from .shared import put_lines, put_squad, real_data

SST2, QNLI = TASKS["sst2"], TASKS["qnli"]


def sentences(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"sentence": f"w{first + i}", "label": i % 2} for i in range(count)]


@given(
    groups=st.lists(st.text("abc", max_size=3), min_size=2, max_size=40),
    share=st.integers(2, 12),
    seed=st.integers(0, 99),
)
def test_groups_part_whole_groups_whatever_the_order(
    groups: list[str], share: int, seed: int
) -> None:
    examples = [Example((str(number), group), 0) for number, group in enumerate(groups)]
    distinct = set(groups)
    if len(distinct) < 2:
        with pytest.raises(ValueError, match="of 1 groups can't be split"):
            split_by_group(examples, share)
        return
    most, held = split_by_group(examples, share)
    assert sorted(most + held, key=lambda e: int(e.texts[0])) == examples
    assert not {e.group for e in most} & {e.group for e in held}
    assert len({e.group for e in held}) == max(1, len(distinct) // share)
    shuffled = random.Random(seed).sample(examples, len(examples))
    assert set(split_by_group(shuffled, share)[1]) == set(held)


def test_a_file_for_each_split_is_taken_whole(tmp_path: Path) -> None:
    put_lines(tmp_path / "sst2" / "train.jsonl", sentences(20))
    put_lines(tmp_path / "sst2" / "validation.jsonl", sentences(6, first=50))
    training, validation = (f(SST2, tmp_path) for f in (training_split, validation_split))
    assert (len(training.examples), training.origin) == (20, "train.jsonl")
    assert (len(validation.examples), validation.origin) == (6, "validation.jsonl")


def test_what_is_measured_on_is_left_out_of_training(tmp_path: Path) -> None:
    put_lines(tmp_path / "sst2" / "train.jsonl", sentences(20))
    put_lines(tmp_path / "sst2" / "validation.jsonl", sentences(6, first=15))
    found = training_split(SST2, tmp_path)
    assert len(found.examples) == 15
    assert found.origin == "train.jsonl without 5 that are in the validation set"


@pytest.mark.parametrize("name", ["train", "validation"])
def test_one_file_serves_for_both(name: str, tmp_path: Path) -> None:
    put_lines(tmp_path / "sst2" / f"{name}.jsonl", sentences(20))
    training, validation = (f(SST2, tmp_path) for f in (training_split, validation_split))
    assert len(training.examples) == 16 and len(validation.examples) == 4
    assert not set(training.examples) & set(validation.examples)
    assert validation.origin == f"4 of 20 in {name}.jsonl"
    assert len(validation_split(SST2, tmp_path, whole=True).examples) == 20


def test_questions_are_parted_by_article(tmp_path: Path) -> None:
    put_squad(tmp_path / "squad" / "dev-v1.1.json", articles=10)
    training, validation = (
        {question.article for question in split(TASKS["squad"], tmp_path).examples}
        for split in (training_split, validation_split)
    )
    assert len(training) == 8 and len(validation) == 2 and not training & validation


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no file of sst2.*train.jsonl.*dev.tsv"):
        validation_split(SST2, tmp_path)
    (tmp_path / "sst2" / "validation.jsonl").touch()
    with pytest.raises(ValueError, match=r"validation.jsonl holds no example of sst2"):
        validation_split(SST2, tmp_path)


def test_fewer_examples() -> None:
    split = Split(list(range(10)), "file")
    assert split.first(None) is split.first(10) is split.sample(None, 0) is split
    assert split.first(3) == Split([0, 1, 2], "the first 3 of file")
    drawn = split.sample(4, 1)
    assert len(set(drawn.examples)) == 4 and drawn.origin == "4 drawn from file"
    assert drawn == split.sample(4, 1) != split.sample(4, 2)


def test_the_hub_is_asked_by_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    asked = []

    def load(name: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        row = {"premise": f"{split} w1", "hypothesis": "w2", "label": 2}
        return [row]

    monkeypatch.setattr("datasets.load_dataset", load)
    found = training_split(TASKS["mnli"])
    assert found.examples == [Example(("train w1", "w2"), 2)]
    glue = ("nyu-mll/glue", "mnli")
    assert asked == [(*glue, "train"), (*glue, "validation_matched")]


def test_a_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(OSError, match=r"sst2 can't be had.*no network.*give the folder"):
        validation_split(SST2)


@pytest.mark.parametrize(
    ("name", "training", "validation"),
    [
        ("sst2", 6920, 872),
        ("mrpc", 4076 - 408, 408),
        ("qnli", 5463, None),
        ("stsb", 5749, 1500),
        ("squad", 1190, None),
    ],
)
def test_the_published_files(name: str, training: int, validation: int | None) -> None:
    """As many as their authors say, less what is in both files. One file serves for both splits of
    QNLI and SQuAD."""
    data, task = real_data(), TASKS[name]
    learned, measured = training_split(task, data), validation_split(task, data)
    counts = len(learned.examples), len(measured.examples)
    if validation is None:
        assert sum(counts) == training and abs(counts[1] - training / 5) < 0.03 * training
    else:
        assert counts[1] == validation and training - 60 <= counts[0] <= training
    identities = [{e.identity for e in split.examples} for split in (learned, measured)]
    assert not identities[0] & identities[1]
