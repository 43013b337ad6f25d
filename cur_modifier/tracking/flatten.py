"""Nested settings to the flat keys and short strings that MLflow takes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from loguru import logger

# MLflow 3 (mlflow.utils.validation) takes tag values of 8000 characters; older servers take 5000.
MAX_KEY_LENGTH = 250
MAX_PARAM_VALUE_LENGTH = 6000
MAX_TAG_VALUE_LENGTH = 5000
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1000
# A request may have 1e6 characters of JSON; the rest is for what surrounds the entries.
MAX_BATCH_CHARACTERS = 900_000

_CUT_MARK = " ... [cut]"
_DIGEST_LENGTH = 8

T = TypeVar("T")


def flatten(settings: Mapping[str, Any]) -> dict[str, str]:
    """Nested mappings and lists as one mapping of dotted keys to text.

    A list of plain values stays one entry, written as JSON (``["q_proj", "k_proj"]``), because one
    column is what a reader compares between runs; any other list gets its indices as keys.
    Numbers, booleans and None are written as in JSON and YAML.

    >>> flatten({"rank": {"max": 256}, "stages": [{"form": "cur"}], "ignore": ["lm_head"]})
    {'rank.max': '256', 'stages.0.form': 'cur', 'ignore': '["lm_head"]'}
    """
    leaves = ((path, _text(value)) for path, value in _leaves(settings, ()) if path)
    return unique_keys(leaves, ".".join)


def unique_keys(items: Iterable[tuple[Any, T]], name: Callable[[Any], str] = str) -> dict[str, T]:
    """``items`` under keys that MLflow takes; ``name`` gives the wanted key of an item.

    A key that had to be cut, or that equals one already taken once its refused characters are
    replaced, ends in a digest of the original, so that no two items share a key.
    """
    taken: dict[str, T] = {}
    for raw, value in items:
        wanted = name(raw)
        key = clean_key(wanted)
        if key in taken or len(key) > MAX_KEY_LENGTH:
            digest = hashlib.sha256(repr(raw).encode()).hexdigest()[:_DIGEST_LENGTH]
            key = f"{key[: MAX_KEY_LENGTH - _DIGEST_LENGTH - 1]}-{digest}"
        if key != wanted:
            logger.debug(f"MLflow: the key {wanted!r} is recorded as {key!r}.")
        taken[key] = value
    return taken


def clean_key(key: str) -> str:
    """``key`` with every character that MLflow refuses replaced by ``_``; never empty.

    MLflow takes letters, digits and ``_ - . space /`` (and ``:``, but not on Windows). It also
    refuses keys that change when read as a path, so empty, ``.`` and ``..`` parts become ``_``.
    """
    parts = re.sub(r"[^\w.\- /]", "_", key).split("/")
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)


def cut(text: str, limit: int, *, key: str) -> str:
    """``text``, shortened to ``limit`` characters with a visible mark where it is longer.

    NUL and lone surrogates, which databases refuse, become ``?``.
    """
    text = text.replace("\0", "?").encode("utf-8", "replace").decode("utf-8")
    if len(text) <= limit:
        return text
    logger.debug(f"MLflow: the value of {key!r} is cut from {len(text)} to {limit} characters.")
    return text[: limit - len(_CUT_MARK)] + _CUT_MARK


def batches(items: Iterable[T], *, count: int, text: Callable[[T], str]) -> Iterator[list[T]]:
    """``items`` in order, in lists that fit one MLflow request.

    Args:
        count: the most items a list may hold.
        text: what an item contributes to the request, which may have MAX_BATCH_CHARACTERS.
    """
    batch: list[T] = []
    characters = 0
    for item in items:
        # JSON escapes count: a letter outside ASCII takes six characters. The 100 are for the
        # names and numbers of the entry.
        size = len(json.dumps(text(item))) + 100
        if batch and (len(batch) == count or characters + size > MAX_BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(item)
        characters += size
    if batch:
        yield batch


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    children: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping) and value:
        children = value.items()
    elif _is_list(value) and any(isinstance(v, Mapping) or _is_list(v) for v in value):
        children = enumerate(value)
    else:
        yield path, value
        return
    for key, child in children:
        yield from _leaves(child, (*path, str(key)))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _text(value: Any) -> str:
    if isinstance(value, str):
        # str.__str__, because a str enum would otherwise give its class and member name.
        return str.__str__(value)
    if value is None or isinstance(value, bool | int | float | list | tuple | Mapping):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)
