"""Files become windows of tokens, and what is wrong with a file is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cur_modifier.data import calibration_dataset, read_documents, token_windows


def tokenize(text: str, **_: Any) -> Any:
    """One token a character: enough to count with."""
    return SimpleNamespace(input_ids=torch.tensor([[ord(c) for c in text]]))


def test_text_is_one_document_with_its_lines_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\n two\n")
    assert read_documents(tmp_path / "a.txt") == ["one\r\n\n two\n"]


def test_json_lines_plain_and_gzipped(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": t, "body": t * 2}) for t in ("a", "b")) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    assert read_documents(tmp_path / "a.jsonl") == ["a", "b"]
    assert read_documents(tmp_path / "b.jsonl.gz", column="body") == ["aa", "bb"]


def test_folder_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "c.txt").mkdir()
    assert read_documents(tmp_path) == ["first", "second"]


@pytest.mark.parametrize("name", ["no/such/file.txt", "missing.jsonl", "/nowhere"])
def test_missing_file(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder.*\.jsonl"):
        read_documents(name)


def test_a_hub_name_may_hold_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[Any]] = {"text": ["one", "two"]}
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: rows)
    assert read_documents("teknium/OpenHermes-2.5") == ["one", "two"]
    rows["text"][1] = None
    with pytest.raises(ValueError, match="row 1: 'text' holds None, no text"):
        read_documents("teknium/OpenHermes-2.5")


def test_empty_and_broken_files(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(tmp_path / "empty.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object"):
        read_documents(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match=r"line 1.*'body'"):
        read_documents(tmp_path / "bad.jsonl", column="body")


def test_a_line_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(ValueError, match=r"line 2.*it holds None, no text"):
        read_documents(tmp_path / "null.jsonl")


def test_windows_do_not_overlap() -> None:
    windows = token_windows(["abcdef", "gh"], tokenize, windows=None, sequence_length=4)
    assert "".join(map(chr, windows.flatten().tolist())) == "abcdef\n\n"
    assert windows.shape == (2, 4)


def test_too_short_a_text_names_the_tokens() -> None:
    with pytest.raises(ValueError, match="has 3 tokens, but 2 windows of 4 need 8"):
        token_windows(["abc"], tokenize, windows=2, sequence_length=4)
    with pytest.raises(ValueError, match="need 4"):
        token_windows(["abc"], tokenize, windows=None, sequence_length=4)


def test_calibration_dataset_is_tokenized(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text("abcdefgh")
    dataset = calibration_dataset(tmp_path / "a.txt", tokenize, samples=2, sequence_length=3)
    assert dataset["input_ids"] == [[97, 98, 99], [100, 101, 102]]
    assert dataset["attention_mask"] == [[1, 1, 1]] * 2


def test_windows_that_overlap() -> None:
    windows = token_windows(["abcdefgh"], tokenize, windows=None, sequence_length=4, stride=3)
    assert ["".join(map(chr, window)) for window in windows.tolist()] == ["abcd", "defg"]
    with pytest.raises(ValueError, match="3 windows of 4 need 10"):
        token_windows(["abcdefgh"], tokenize, windows=3, sequence_length=4, stride=3)


@pytest.mark.parametrize("stride", [0, 5])
def test_a_stride_that_leaves_tokens_out(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride {stride} is not between 1 and"):
        token_windows(["abcdefgh"], tokenize, windows=1, sequence_length=4, stride=stride)
