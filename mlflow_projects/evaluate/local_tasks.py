"""lm-eval's tasks on questions in local files, for machines that reach no hub.

    python mlflow_projects/evaluate/local_tasks.py DATA OUT
    lm_eval run --include_path OUT --tasks boolq,piqa ...

Prompts, metrics and versions are lm-eval's own: each task file that is written includes lm-eval's
and names other data. DATA holds the files as their authors publish them; any may be missing:

    boolq/validation.jsonl[.gz]         question, passage, answer
    piqa/valid.jsonl, valid-labels.lst  goal, sol1, sol2; a line a label
    winogrande/validation_xl.jsonl      sentence, option1, option2, answer
    arc/ARC-Easy.test.jsonl, arc/ARC-Challenge.test.jsonl
                                        query, choices, gold
    mmlu/*.tar.gz                       dev/SUBJECT_dev.csv, test/SUBJECT_test.csv
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml

Row = dict[str, Any]
Splits = Mapping[str, Iterator[Row]]

UPSTREAM = Path(lm_eval.tasks.__file__).parent
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class _Local:
    """How one task of lm-eval is made from local files.

    Attributes:
        include: lm-eval's own task file, under its folder of tasks.
        read: rows by split, as the hub's data set has them.
        needs: one of these files, looked up in order.
    """

    include: str
    read: Callable[[Path], Splits]
    needs: tuple[str, ...]


def write_tasks(data: Path, out: Path) -> list[str]:
    """Write a task file and its questions for each task whose data is there; returns their names.

    ``out`` is written whole or not at all; one that exists is kept, so name it by the data
    (:func:`cached_tasks`).

    Raises:
        FileNotFoundError: none of the files is in ``data``.
        ValueError: a file that does not hold what it should, with the line.
    """
    found = {name: (task, file) for name, task in _TASKS.items() if (file := _first(data, task))}
    subjects = next(iter(sorted(data.glob("mmlu/*.tar.gz"))), None)
    if not found and subjects is None:
        known = sorted({need for task in _TASKS.values() for need in task.needs})
        raise FileNotFoundError(
            f"{data} holds none of the tasks' files: {', '.join(known)}, mmlu/*.tar.gz."
        )
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for name, (task, file) in found.items():
            _write(name, task.include, task.read(file), partial, out)
        written = list(found)
        if subjects is not None:
            for subject, splits in _mmlu(subjects).items():
                name = f"mmlu_{subject}"
                _write(name, f"mmlu/default/{name}.yaml", splits, partial, out)
                written.append(name)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written


def cached_tasks(data: Path) -> Path:
    """A folder of the tasks of ``data``, made once for its files and this copy of lm-eval, whose
    own files it names.

    It lies in the user's cache folder.
    """
    from cur_modifier.cache import cache_folder  # with all of the package: not for a script

    if not data.is_dir():
        raise FileNotFoundError(f"no folder {data} of task data.")
    stamp = hashlib.sha256(f"{lm_eval.__version__} {UPSTREAM} ".encode())
    stamp.update(Path(__file__).read_bytes())
    for file in sorted(path for path in data.rglob("*") if path.is_file()):
        stamp.update(f"{file.relative_to(data)} ".encode())
        with file.open("rb") as opened:
            stamp.update(hashlib.file_digest(opened, "sha256").digest())
    folder = cache_folder() / "tasks" / stamp.hexdigest()[:16]
    if not folder.exists():
        write_tasks(data, folder)
    return folder


def _write(name: str, include: str, splits: Splits, partial: Path, final: Path) -> None:
    """One task file, and a file of rows a split."""
    files = {}
    for split, rows in splits.items():
        file = f"{name}.{split}.jsonl"
        with (partial / file).open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        files[split] = str((final / file).resolve())
    task = {
        "include": str(UPSTREAM / include),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        # Examples for a few-shot prompt come from what there is: lm-eval leaves the question out.
        "training_split": None,
        "validation_split": "validation" if "validation" in splits else None,
        "test_split": "test" if "test" in splits else None,
    }
    if not name.startswith("mmlu_"):
        task["tag"] = []  # lm-eval's own tags would be left with these tasks alone
    (partial / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def _first(data: Path, task: _Local) -> Path | None:
    return next((data / need for need in task.needs if (data / need).is_file()), None)


def _lines(file: Path) -> Iterator[Row]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TypeError
            except (json.JSONDecodeError, TypeError):
                raise ValueError(f"{file}, line {number}: expected a JSON object.") from None
            yield row


def _taken(file: Path, convert: Callable[[Row], Row]) -> Iterator[Row]:
    for number, row in enumerate(_lines(file), start=1):
        try:
            yield convert(row)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{file}, line {number}: {error!r} in {sorted(row)}.") from None


def _boolq(file: Path) -> Splits:
    def convert(row: Row) -> Row:
        return {k: row[k] for k in ("question", "passage")} | {"label": int(row["answer"])}

    return {"validation": _taken(file, convert)}


def _piqa(file: Path) -> Splits:
    labels_file = file.with_name("valid-labels.lst")
    if not labels_file.is_file():
        raise ValueError(f"{file} has no labels: {labels_file} is not there.")
    labels = labels_file.read_text().split()

    def rows() -> Iterator[Row]:
        questions = list(_lines(file))
        if len(questions) != len(labels):
            raise ValueError(f"{file} has {len(questions)} lines, {labels_file} {len(labels)}.")
        for row, label in zip(questions, labels, strict=True):
            yield row | {"label": int(label)}

    return {"validation": rows()}


def _winogrande(file: Path) -> Splits:
    keys = ("sentence", "option1", "option2", "answer")
    return {"validation": _taken(file, lambda row: {key: row[key] for key in keys})}


def _arc(file: Path) -> Splits:
    def convert(row: Row) -> Row:
        question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = list(LETTERS[: len(row["choices"])])
        return {
            "id": row["id"],
            "question": question,
            "choices": {"text": row["choices"], "label": labels},
            "answerKey": labels[row["gold"]],
        }

    return {"test": _taken(file, convert)}


def _mmlu(archive: Path) -> dict[str, Splits]:
    """Splits by subject, in the order of the archive's names."""
    subjects: dict[str, dict[str, Iterator[Row]]] = {}
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            split, stem = Path(member.name).parent.name, Path(member.name).stem
            if split not in ("dev", "test") or not stem.endswith(f"_{split}"):
                continue
            opened = tar.extractfile(member)
            if opened is None:
                continue
            text = io.TextIOWrapper(opened, encoding="utf-8", newline="")
            rows = [_choice(cells, member.name) for cells in csv.reader(text)]
            subjects.setdefault(stem.removesuffix(f"_{split}"), {})[split] = iter(rows)
    lacking = sorted(name for name, splits in subjects.items() if len(splits) < 2)
    if lacking or not subjects:
        raise ValueError(f"{archive} lacks dev or test questions of {lacking or 'all subjects'}.")
    return dict(subjects)


def _choice(cells: list[str], name: str) -> Row:
    if len(cells) != 6 or cells[5] not in "ABCD":
        raise ValueError(f"{name}: expected a question, four choices and A to D, got {cells}.")
    return {"question": cells[0], "choices": cells[1:5], "answer": "ABCD".index(cells[5])}


_TASKS = {
    "boolq": _Local(
        "super_glue/boolq/default.yaml",
        _boolq,
        ("boolq/validation.jsonl", "boolq/validation.jsonl.gz"),
    ),
    "piqa": _Local("piqa/piqa.yaml", _piqa, ("piqa/valid.jsonl",)),
    "winogrande": _Local(
        "winogrande/default.yaml", _winogrande, ("winogrande/validation_xl.jsonl",)
    ),
    "arc_easy": _Local("arc/arc_easy.yaml", _arc, ("arc/ARC-Easy.test.jsonl",)),
    "arc_challenge": _Local("arc/arc_challenge.yaml", _arc, ("arc/ARC-Challenge.test.jsonl",)),
}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(*write_tasks(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
    except (OSError, ValueError) as problem:
        sys.exit(f"local_tasks: {problem}")
