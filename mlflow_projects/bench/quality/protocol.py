"""Protocol P: the model, its texts, and how they are cut.

Calibration and evaluation never share a text: calibration takes the start of WikiText-2's
validation text, or C4's documents 0 to 499; evaluation takes the start of WikiText-2's test text,
and C4's documents 500 to 999. Hyper-parameters are chosen on the validation text's second half.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.smollm2 import smollm2

if TYPE_CHECKING:
    import torch

__all__ = [
    "CALIBRATIONS",
    "DATA",
    "RATIOS",
    "WIKI_TEST",
    "WIKI_VALID",
    "calibration_windows",
    "evaluation_windows",
    "missing_files",
    "model_directory",
]

REPOSITORY = Path(__file__).resolve().parents[3]
DATA = REPOSITORY.parent / "shared" / "data"

CALIBRATIONS = ("wikitext", "c4")
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
SEQUENCE_LENGTH = 1024
CALIBRATION_WINDOWS = 64
TEST_WINDOWS = 24
HELD_OUT_WINDOWS = 8

WIKI_TEST = "wikitext2-raw/wiki.test.raw"
WIKI_VALID = "wikitext2-raw/wiki.valid.raw"
C4 = "c4/c4_en_train_first1000.jsonl"
C4_DOCUMENTS = 1000


def missing_files(data: Path) -> list[str]:
    """The texts that the folder lacks, as paths inside it."""
    return [file for file in (WIKI_TEST, WIKI_VALID, C4) if not (data / file).is_file()]


def model_directory(model: str | None) -> str:
    """The given model, or SmolLM2-135M-Instruct (fetched and converted on first use)."""
    return str(smollm2()) if model is None else model


def calibration_windows(name: str, data: Path, tokenizer: Any) -> torch.Tensor:
    """``(64, 1024)`` token ids of the calibration text ``name``."""
    documents = [_halves(data)[0]] if name == "wikitext" else _c4(data)[: C4_DOCUMENTS // 2]
    return _windows(documents, tokenizer, CALIBRATION_WINDOWS)


def evaluation_windows(
    data: Path, tokenizer: Any, *, held_out: bool = False
) -> dict[str, torch.Tensor]:
    """Token ids ``(windows, 1024)`` to evaluate on, by the name of the text.

    ``wikitext`` and ``c4``, 24 windows each; or with ``held_out`` only the first 8 windows of the
    validation text's second half, which no calibration sees.
    """
    from cur_modifier.data import read_documents

    if held_out:
        return {"held_out": _windows([_halves(data)[1]], tokenizer, HELD_OUT_WINDOWS)}
    return {
        "wikitext": _windows(read_documents(data / WIKI_TEST), tokenizer, TEST_WINDOWS),
        "c4": _windows(_c4(data)[C4_DOCUMENTS // 2 :], tokenizer, TEST_WINDOWS),
    }


def _halves(data: Path) -> tuple[str, str]:
    """The validation text cut at the middle character: to calibrate on, and held out."""
    from cur_modifier.data import read_documents

    text = "".join(read_documents(data / WIKI_VALID))
    return text[: len(text) // 2], text[len(text) // 2 :]


def _c4(data: Path) -> list[str]:
    from cur_modifier.data import read_documents

    documents = read_documents(data / C4)
    if len(documents) != C4_DOCUMENTS:
        raise ValueError(
            f"{data / C4} holds {len(documents)} documents; protocol P splits the first "
            f"{C4_DOCUMENTS} of C4's English training set. Put those there."
        )
    return documents


def _windows(documents: list[str], tokenizer: Any, count: int) -> torch.Tensor:
    from cur_modifier.data import token_windows

    return token_windows(documents, tokenizer, windows=count, sequence_length=SEQUENCE_LENGTH)
