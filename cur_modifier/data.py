"""Text files, JSON lines and hub data sets as calibration data and as evaluation windows.

``oneshot`` takes a ``datasets.Dataset``; what users have is a file.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["calibration_dataset", "read_documents", "token_windows", "windows_dataset"]

_TEXT = {".txt", ".raw", ".md", ".text"}
_LINES = {".jsonl", ".ndjson"}


def read_documents(source: str | Path, *, column: str = "text", split: str = "train") -> list[str]:
    """The documents of a text file, a JSON-lines file (either may be gzipped), a folder of such, or
    a data set on the Hugging Face hub, of which the ``split`` is read.

    A text file is one document, its lines as they are. A JSON line is one, in field ``column``.

    Raises:
        FileNotFoundError: neither a file, a folder, nor the form of a hub name.
        ValueError: no text in it; a line that is not JSON or lacks the column, or a row that is no
            text, with its number.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if _kind(p) is not None and p.is_file())
        documents = [doc for file in files for doc in _read_file(file, column)]
    elif path.is_file():
        documents = _read_file(path, column)
    elif (
        path.is_absolute()
        or _kind(path) is not None
        or str(source).startswith(".")
        or str(source).count("/") > 1
    ):
        raise FileNotFoundError(
            f"no file or folder {str(source)!r}. Give a .txt or .jsonl file, a folder of them, or "
            "the name of a data set on the hub."
        )
    else:
        from datasets import load_dataset

        documents = load_dataset(str(source), split=split)[column]
        for number, document in enumerate(documents):
            if not isinstance(document, str):
                raise ValueError(
                    f"{str(source)!r}, row {number}: {column!r} holds {document!r}, no text."
                )
    documents = [doc for doc in documents if doc.strip()]
    if not documents:
        raise ValueError(
            f"{str(source)!r} holds no text (files {sorted(_TEXT | _LINES)}, gzipped or not)."
        )
    return documents


def token_windows(
    documents: Sequence[str],
    tokenizer: Any,
    *,
    windows: int | None,
    sequence_length: int,
    stride: int | None = None,
) -> torch.Tensor:
    """``(windows, sequence_length)`` token ids: the documents joined and cut.

    Args:
        windows: how many, from the start; None takes all that fill up.
        stride: tokens from the start of one window to that of the next, at most their length,
            which is the default: no overlap.

    Raises:
        ValueError: the text is too short, with the tokens needed and found; a stride that leaves
            tokens out.
    """
    stride = sequence_length if stride is None else stride
    if not 1 <= stride <= sequence_length:
        raise ValueError(
            f"stride {stride} is not between 1 and the windows' {sequence_length} tokens."
        )
    ids = tokenizer("\n\n".join(documents), return_tensors="pt", verbose=False).input_ids[0]
    full = max((len(ids) - sequence_length) // stride + 1, 0)
    wanted = full if windows is None else windows
    if wanted < 1 or wanted > full:
        need = (max(wanted, 1) - 1) * stride + sequence_length
        raise ValueError(
            f"the text has {len(ids)} tokens, but {max(wanted, 1)} windows of {sequence_length} "
            f"need {need}. Give more text, fewer windows or shorter ones."
        )
    return ids.unfold(0, sequence_length, stride)[:wanted]


def calibration_dataset(
    source: str | Path,
    tokenizer: Any,
    *,
    samples: int = 64,
    sequence_length: int = 1024,
    column: str = "text",
    split: str = "train",
) -> Dataset:
    """A tokenized ``Dataset`` of ``samples`` windows, ready for ``oneshot(dataset=...)``.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_documents` and :func:`token_windows`.
    """
    documents = read_documents(source, column=column, split=split)
    return windows_dataset(
        token_windows(documents, tokenizer, windows=samples, sequence_length=sequence_length)
    )


def windows_dataset(windows: torch.Tensor) -> Dataset:
    """``windows (count, length)`` of token ids as a ``Dataset`` for ``oneshot(dataset=...)``."""
    from datasets import Dataset

    return Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    )


def _kind(path: Path) -> str | None:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return "text" if suffix in _TEXT else "lines" if suffix in _LINES else None


def _read_file(path: Path, column: str) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        if _kind(path) != "lines":
            return [file.read()]
        documents = []
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[column]
                if not isinstance(text, str):
                    raise TypeError(f"it holds {text!r}, no text")
                documents.append(text)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with the field {column!r} "
                    f"({error})."
                ) from None
        return documents
