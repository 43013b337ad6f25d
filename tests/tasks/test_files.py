"""Each kind of file gives its rows, and says which line is broken."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from cur_modifier.tasks.files import find_file, read_rows, task_folder
from cur_modifier.tasks.table import TASKS


def rows(path: Path, text: str) -> list[tuple[str, dict[str, str]]]:
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return [(where.removeprefix(f"{path}, "), row) for where, row in read_rows(path)]


def test_each_kind(tmp_path: Path) -> None:
    expected = [("line 1", {"sentence": "good", "label": 1})]
    assert rows(tmp_path / "train.jsonl", '{"sentence": "good", "label": 1}\n') == expected
    assert rows(tmp_path / "dev.jsonl.gz", '{"sentence": "good", "label": 1}\n') == expected
    table = "\ufeffa\tb\r\nit's \"\tone\r\n"
    assert rows(tmp_path / "dev.tsv", table) == [("line 2", {"a": "it's \"", "b": "one"})]
    assert rows(tmp_path / "msr_paraphrase_train.txt", table)[0][1]["b"] == "one"
    pair = {"sentence1": "a, b", "sentence2": "c", "score": "2.5"}
    assert rows(tmp_path / "stsb-en-dev.csv", '"a, b",c,2.5\n') == [("line 1", pair)]
    labelled = {"label": "1", "sentence": "a good film"}
    assert rows(tmp_path / "stsa.binary.train", "1 a good film\n") == [("line 1", labelled)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dev.jsonl", "{}\n[]\n", "line 2: expected a JSON object"),
        ("dev.jsonl", "{}\n\n", "line 2: expected a JSON object"),
        ("dev.tsv", "a\tb\nc\n", "line 2: 1 columns where the header has 2"),
        ("stsb-en-dev.csv", "a,b\n", "line 1: expected two sentences and a score"),
    ],
)
def test_a_broken_line_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / name, text)


def test_a_folder_of_tasks_may_be_given_at_three_heights(tmp_path: Path) -> None:
    folder = tmp_path / "glue" / "sst2"
    folder.mkdir(parents=True)
    for given in (tmp_path, tmp_path / "glue", folder):
        assert task_folder(given, TASKS["sst2"]) == folder
    (tmp_path / "squad").mkdir()
    assert task_folder(tmp_path, TASKS["squad_v2"]) == tmp_path / "squad"
    with pytest.raises(FileNotFoundError, match=r"no folder mrpc .*mrpc/validation.jsonl lies"):
        task_folder(tmp_path, TASKS["mrpc"])


def test_the_first_name_that_is_there_is_taken(tmp_path: Path) -> None:
    task = TASKS["sst2"]
    assert find_file(tmp_path, task, "train") is None
    for name in ("stsa.binary.train", "train.tsv.gz", "train.jsonl"):
        (tmp_path / name).touch()
        assert find_file(tmp_path, task, "train") == tmp_path / name
    assert find_file(tmp_path, task, "validation") is None
