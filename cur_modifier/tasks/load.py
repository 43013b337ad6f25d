"""The examples of a task, from local files or from the hub: the one place that reads them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cur_modifier.tasks.examples import Example, Question, example_of
from cur_modifier.tasks.files import find_file, names_of_files, read_rows, task_folder
from cur_modifier.tasks.squad import check_questions, question_of, read_questions
from cur_modifier.tasks.table import Head, Task

__all__ = ["Split", "split_by_group", "training_split", "validation_split"]

SHARE = 5  # one group in so many is for validation where one file has to serve for both


@dataclass(frozen=True)
class Split:
    """Examples (of SQuAD: questions), and for people where they come from."""

    examples: Sequence[Any]
    origin: str

    def first(self, limit: int | None) -> Split:
        """At most ``limit`` of them, from the start."""
        if limit is None or limit >= len(self.examples):
            return self
        return Split(self.examples[:limit], f"the first {limit} of {self.origin}")

    def sample(self, count: int | None, seed: int) -> Split:
        """At most ``count`` of them, drawn at random: files may be sorted by their source."""
        if count is None or count >= len(self.examples):
            return self
        chosen = random.Random(seed).sample(self.examples, count)
        return Split(chosen, f"{count} drawn from {self.origin}")


def validation_split(task: Task, data: str | Path | None = None, *, whole: bool = False) -> Split:
    """What models of a task are measured on: the public validation set.

    A folder that has one file for both splits, as of QNLI or XQuAD, gives a fifth of it, by
    sentence or article: always the same fifth, so that no model is measured on what it was trained
    on.

    Args:
        data: the folder of task data; the hub's data set where it is None or empty.
        whole: all of such a file, for a model that was trained elsewhere.

    Raises:
        OSError: no such folder or file; a hub that can't be reached.
        ValueError: a file that does not hold what it should, with the line.
    """
    if not data:
        return _of_hub(task, task.hub_validation)
    path, alone = _file(task, Path(data), "validation")
    examples = _read(task, path)
    if whole or not alone:
        return Split(examples, path.name)
    part = split_by_group(examples, SHARE)[1]
    return Split(part, f"{len(part)} of {len(examples)} in {path.name}")


def training_split(task: Task, data: str | Path | None = None) -> Split:
    """What a task is learned from: the training set, without what is in the validation set.

    MRPC's original training file holds the 408 pairs of GLUE's validation set. Where a folder has
    one file for both splits, this is what :func:`validation_split` leaves.

    Raises:
        OSError, ValueError: as :func:`validation_split`.
    """
    if data:
        path, alone = _file(task, Path(data), "train")
        examples = _read(task, path)
        if alone:
            part = split_by_group(examples, SHARE)[0]
            return Split(part, f"{len(part)} of {len(examples)} in {path.name}")
        found = Split(examples, path.name)
    else:
        found = _of_hub(task, "train")
    validation = {example.identity for example in validation_split(task, data).examples}
    kept = [example for example in found.examples if example.identity not in validation]
    left_out = len(found.examples) - len(kept)
    without = f" without {left_out} that are in the validation set" if left_out else ""
    return Split(kept, f"{found.origin}{without}")


def split_by_group(examples: Sequence[Any], share: int) -> tuple[list[Any], list[Any]]:
    """The greater part of examples, and one group of them in ``share`` held out, at least one.

    Which groups are held out depends on what the examples say alone: neither on their order nor on
    a seed.

    Raises:
        ValueError: all examples are of one group.
    """
    groups = sorted({example.group for example in examples}, key=_digest)
    if len(groups) < 2:
        raise ValueError(
            f"{len(examples)} examples of {len(groups)} groups can't be split into training and "
            "validation. Give more, or a file for each."
        )
    chosen = set(groups[: max(1, len(groups) // share)])
    return (
        [example for example in examples if example.group not in chosen],
        [example for example in examples if example.group in chosen],
    )


def _digest(group: str) -> bytes:
    return hashlib.sha256(group.encode()).digest()


def _file(task: Task, data: Path, split: str) -> tuple[Path, bool]:
    """The file of a split, and whether it has to serve for the other one too."""
    folder = task_folder(data, task)
    found = {name: find_file(folder, task, name) for name in ("train", "validation")}
    path = found.pop(split)
    other = found.popitem()[1]
    if path is None and other is None:
        wanted = names_of_files(task, "train") + names_of_files(task, "validation")
        raise FileNotFoundError(
            f"{folder} holds no file of {task.name}. Give one or more of {', '.join(wanted)}, "
            "gzipped or not."
        )
    return (path or other, path is None or other is None)  # type: ignore[return-value]


def _read(task: Task, path: Path) -> Sequence[Any]:
    examples: Sequence[Example | Question]
    if task.head is Head.QUESTION_ANSWERING:
        examples = questions = read_questions(path)
        check_questions(task, questions, str(path))
    else:
        examples = [example_of(task, row, where) for where, row in read_rows(path)]
    if not examples:
        raise ValueError(f"{path} holds no example of {task.name}. Give a file that does.")
    return examples


def _of_hub(task: Task, split: str) -> Split:
    from datasets import load_dataset

    name, configuration = task.hub
    try:
        rows = load_dataset(name, configuration, split=split)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the examples of {task.name} can't be had from the hub ({name}): {error}. Where it is "
            "out of reach, give the folder of task data."
        ) from None
    where = " ".join(part for part in (name, configuration, split) if part)
    if task.head is Head.QUESTION_ANSWERING:
        return Split([question_of(row) for row in rows], where)
    return Split(
        [example_of(task, row, f"{where}, row {number}") for number, row in enumerate(rows)], where
    )
