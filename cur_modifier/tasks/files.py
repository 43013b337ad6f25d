"""Files of tasks as rows: JSON lines, tables with tabs, and the forms of single data sets."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from cur_modifier.tasks.table import Head, Task

__all__ = ["find_file", "names_of_files", "read_rows", "task_folder"]

Row = dict[str, Any]

_ANY_TASK = {
    "train": ("train.jsonl", "train.tsv"),
    "validation": ("validation.jsonl", "dev.tsv"),
}


def task_folder(data: Path, task: Task) -> Path:
    """The folder of a task's files: `data/TASK`, `data/glue/TASK`, or `data` itself by that name.

    SQuAD 2.0 may lie beside 1.1, in `squad`.

    Raises:
        FileNotFoundError: there is none.
    """
    names = (task.name, "squad") if task.head is Head.QUESTION_ANSWERING else (task.name,)
    wanted = [data / name for name in names] + [data / "glue" / name for name in names]
    if data.name in names:
        wanted.insert(0, data)
    for folder in wanted:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"{data} holds no folder {task.name} of task data. Give the folder in which "
        f"{task.name}/{names_of_files(task, 'validation')[0]} lies."
    )


def names_of_files(task: Task, split: str) -> tuple[str, ...]:
    """Under which names a split's file may lie in the task's folder, each also gzipped."""
    own = task.train if split == "train" else task.validation
    return own if task.head is Head.QUESTION_ANSWERING else _ANY_TASK[split] + own


def find_file(folder: Path, task: Task, split: str) -> Path | None:
    """The file of a split, the first of its names that is there."""
    for name in names_of_files(task, split):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row of a file by its columns, after where it stands.

    Raises:
        ValueError: a line that is not as the file's kind has it.
    """
    kind = path.name.removesuffix(".gz")
    read = next(read for ending, read in _READERS.items() if ending in kind)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        for number, row in read(path, file):
            yield f"{path}, line {number}", row


def _json_lines(path: Path, file: IO[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object.")
        yield number, row


def _tabs(path: Path, file: IO[str]) -> Iterator[tuple[int, Row]]:
    """A table with a header. Quotes are characters like others."""
    header: list[str] = []
    for number, line in enumerate(file, start=1):
        cells = line.rstrip("\r\n").split("\t")
        if not header:
            header = cells
        elif len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(cells)} columns where the header has {len(header)}."
            )
        else:
            yield number, dict(zip(header, cells, strict=True))


def _scored_pairs(path: Path, file: IO[str]) -> Iterator[tuple[int, Row]]:
    """STS-B of stsb-multi-mt: no header."""
    rows = csv.reader(file)
    for cells in rows:
        if len(cells) != 3:
            raise ValueError(
                f"{path}, line {rows.line_num}: expected two sentences and a score, got {cells}."
            )
        yield rows.line_num, dict(zip(("sentence1", "sentence2", "score"), cells, strict=True))


def _label_first(path: Path, file: IO[str]) -> Iterator[tuple[int, Row]]:
    """SST-2 of Kim's CNN: the label, a space, the sentence."""
    for number, line in enumerate(file, start=1):
        label, _, sentence = line.strip().partition(" ")
        yield number, {"label": label, "sentence": sentence}


_READERS: dict[str, Callable[[Path, IO[str]], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _json_lines,
    ".tsv": _tabs,
    ".txt": _tabs,
    ".csv": _scored_pairs,
    "stsa.binary": _label_first,
}
