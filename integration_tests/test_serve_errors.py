"""A damaged or unsupported checkpoint never becomes a running server, and the log says why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CUR, ROW_ID, build, factor
from datasets import Dataset
from safetensors.torch import load_file, save_file
from served import EngineError, by_engine, serve_quietly, side_by_side, vllm_server

pytestmark = [pytest.mark.serve, pytest.mark.slow]

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
WEIGHTS = "model.safetensors"


def edit_section(change: Callable[[dict[str, Any]], None], path: Path) -> None:
    """Change ``quantization_config``."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None], path: Path) -> None:
    """Change the tensors, and the checksum with them: what is tested is what comes after it."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    edit_section(lambda section: section.pop("files"), path)


def truncate(path: Path) -> None:
    """Half a download."""
    whole = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def corrupt(path: Path) -> None:
    """A block of zeros in the middle, as of a bad disk; the header stays right."""
    whole = bytearray((path / WEIGHTS).read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 512] = bytes(512)
    (path / WEIGHTS).write_bytes(whole)


def spoil_header(path: Path) -> None:
    """No safetensors file at all."""
    whole = bytearray((path / WEIGHTS).read_bytes())
    whole[:64] = bytes(64)
    (path / WEIGHTS).write_bytes(whole)


def no_such_module(section: dict[str, Any]) -> None:
    """A module that the model class has no Linear for."""
    section["modules"]["model.layers.0.mlp.experts.0.up_proj"] = section["modules"].pop(K)


def move_module(tensors: dict[str, torch.Tensor]) -> None:
    """Its tensors, under the same name."""
    for key in [key for key in tensors if key.startswith(f"{K}.")]:
        tensors[key.replace(K, "model.layers.0.mlp.experts.0.up_proj")] = tensors.pop(key)


# What is done to the checkpoint, how it is served, what the log must say.
Case = tuple[list[Callable[[Path], None]], list[str], str]
CASES: dict[str, Case] = {
    "factor missing": (
        [partial(edit_tensors, lambda tensors: tensors.pop(f"{Q}.cur_u.weight"))],
        [],
        rf"{Q}.cur_u.weight is missing from the checkpoint. Download or save it again",
    ),
    "bias missing": (
        [partial(edit_tensors, lambda tensors: tensors.pop(f"{K}.bias"))],
        [],
        rf"{K}.bias is missing from the checkpoint",
    ),
    "another rank": (
        [partial(edit_section, lambda section: section["modules"][Q].update(rank=32))],
        [],
        rf"{Q}.cur_r.weight has shape \(48, 192\); config.json gives rank 32",
    ),
    "another shape": (
        [partial(edit_section, lambda section: section["modules"][Q].update(in_features=64))],
        [],
        rf"{Q}.cur_r.weight has shape \(48, 192\).*config.json was edited",
    ),
    "schema of a later version": (
        [partial(edit_section, lambda section: section.update(version=3))],
        [],
        r"schema version 3; this cur-modifier reads versions 1 and 2. Upgrade it",
    ),
    "variant of a later version": (
        [partial(edit_section, lambda section: section["modules"][K].update(axis="column"))],
        [],
        r"form 'id' with axis 'column' needs a newer cur-modifier. Upgrade it",
    ),
    "order is no permutation": (
        [partial(edit_tensors, lambda tensors: tensors[f"{K}.order"].zero_())],
        [],
        rf"{K}.order is not a permutation of the 192 outputs",
    ),
    "weights are not finite": (
        [partial(edit_tensors, lambda tensors: tensors[f"{Q}.cur_c.weight"].fill_(torch.nan))],
        [],
        rf"{Q}.cur_c.weight holds numbers that are not finite",
    ),
    "no Linear of that name": (
        [partial(edit_tensors, move_module), partial(edit_section, no_such_module)],
        [],
        r"experts.0.up_proj is factored, but the model that vLLM built has no Linear of that name",
    ),
    "truncated": ([truncate], [], rf"{WEIGHTS} is truncated or corrupt"),
    "header spoilt": ([spoil_header], [], rf"{WEIGHTS} is truncated or corrupt"),
    "corrupt": ([corrupt], [], rf"{WEIGHTS} is not the file that was saved: its checksum differs"),
    "heads neither split nor repeated": (
        [],
        ["--tensor-parallel-size", "4"],
        rf"{K}: 6 key/value heads can be neither split over nor repeated on 4 ranks. Use",
    ),
    "width does not divide": (
        [],
        ["--tensor-parallel-size", "3"],
        r"mlp.down_proj: 256 does not divide by 3 ranks. Use a --tensor-parallel-size that divides",
    ),
}


ONE_RANK = [case for case in CASES if not CASES[case][1]]
# Whole servers: one that reads config.json and ends, one whose worker finds it, several ranks.
SERVED = ["factor missing", "order is no permutation", *(c for c in CASES if c not in ONE_RANK)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, random_tokens: Dataset) -> Path:
    """A good one."""
    folder = tmp_path_factory.mktemp("errors")
    return factor(build("llama_six_kv_heads"), folder / "good", random_tokens, CUR, ROW_ID)


@pytest.fixture(scope="module")
def broken(checkpoint: Path) -> dict[str, Path]:
    """Each case's checkpoint."""
    paths = {case: checkpoint.with_name(case.replace(" ", "_")) for case in CASES}
    for case, path in paths.items():
        shutil.copytree(checkpoint, path)
        for change in CASES[case][0]:
            change(path)
    return paths


@pytest.fixture(scope="module")
def refusals(broken: dict[str, Path], smollm2: Path) -> dict[str, Any]:
    """What became of each engine."""
    return by_engine({case: broken[case] for case in ONE_RANK}, smollm2, [3, 4], 1)


@pytest.mark.parametrize("case", ONE_RANK)
def test_no_engine_and_the_reason(case: str, refusals: dict[str, Any]) -> None:
    assert isinstance(refusals[case], EngineError), refusals[case]
    assert re.search(CASES[case][2], str(refusals[case])), str(refusals[case])[-8000:]


@pytest.fixture(scope="module")
def outcomes(broken: dict[str, Path], smollm2: Path) -> dict[str, Any]:
    """What became of each server: the error, or nothing where it ran."""

    def start(case: str) -> None:
        path = broken[case]
        with serve_quietly(
            path, path.with_suffix(".log"), "--tokenizer", str(smollm2), *CASES[case][1]
        ):
            pass

    return side_by_side({case: partial(start, case) for case in SERVED})


@pytest.mark.parametrize("case", SERVED)
def test_no_server_and_the_reason(
    case: str, outcomes: dict[str, Any], broken: dict[str, Path]
) -> None:
    error = outcomes[case]
    assert isinstance(error, vllm_server.ServerError), error
    assert "ended with status" in str(error)
    # The reason stands in the log of the process that found it, above those that ended with it.
    log = broken[case].with_suffix(".log").read_text()
    assert re.search(CASES[case][2], log), log[-8000:]
