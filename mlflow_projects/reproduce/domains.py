"""Texts of four kinds, each in two parts that share nothing: to calibrate on, and to evaluate on.

WikiText-2 and C4 come from files. Code and documentation come with Python itself: the modules of
its standard library, and the reference topics of `pydoc_data`.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

WIKITEXT = ("wikitext2-raw/wiki.valid.raw", "wikitext2-raw/wiki.test.raw")
C4 = "c4/c4_en_train_first1000.jsonl"
CODE_CHARACTERS = 1_500_000  # of each part: more than any window count here needs


@dataclass(frozen=True)
class Domain:
    """Documents to calibrate on and documents to evaluate on."""

    calibration: list[str]
    evaluation: list[str]


NAMES = ("wikitext", "c4", "code", "python-docs")


def read(name: str, data: Path) -> Domain:
    """The texts of one domain.

    Raises:
        FileNotFoundError: a file is not in ``data``.
    """
    from cur_modifier.data import read_documents

    if name == "wikitext":
        return Domain(*(read_documents(data / file) for file in WIKITEXT))
    if name == "c4":
        documents = read_documents(data / C4)
        return Domain(documents[: len(documents) // 2], documents[len(documents) // 2 :])
    if name == "code":
        return Domain(*(_modules(part) for part in (0, 1)))
    if name == "python-docs":
        from pydoc_data.topics import topics

        # Several names may have one text: `class`, `def` and `decorators`, for instance.
        documents = list(dict.fromkeys(topics[topic] for topic in sorted(topics)))
        # A third is enough to evaluate on.
        return Domain([text for i, text in enumerate(documents) if i % 3], documents[::3])
    raise ValueError(f"no domain {name!r}; there are {', '.join(NAMES)}.")


def _modules(part: int) -> list[str]:
    """Every other module of the standard library, tests left out, in the order of their names."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file
        for file in library.rglob("*.py")
        if not {"site-packages", "test", "tests", "idlelib", "pydoc_data"} & set(file.parts)
    )
    found, length = [], 0
    for file in files[part::2]:
        text = file.read_text(encoding="utf-8", errors="replace")
        found.append(text)
        length += len(text)
        if length > CODE_CHARACTERS:
            break
    return found
