"""Files that are whole or not there, and fingerprints of what is in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["changed", "digest", "digest_text", "put_text", "replacing"]


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary name beside ``path``, of the same ending; its file takes the place of ``path``
    once it is whole. An error, or a kill at any moment, leaves the old file.

    Args:
        durable: the file is on the disk, and not in the system's memory alone, before it takes that
            place.
    """
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        if durable:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def put_text(path: Path, text: str) -> None:
    """Write a text."""
    with replacing(path) as partial:
        partial.write_text(text)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of dtypes, shapes and bytes. Reads every tensor once, about 1 s a gigabyte."""
    import torch

    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        if data.numel():
            sha.update(data.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def digest_text(value: Any) -> str:
    """SHA-256 of a value's JSON form, keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def changed(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The entries in which two fingerprints differ: those of ``saved`` first."""
    keys = [*saved, *(key for key in now if key not in saved)]
    return [key for key in keys if saved.get(key) != now.get(key)]
