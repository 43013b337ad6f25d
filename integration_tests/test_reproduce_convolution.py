"""The experiment with convolutions: networks trained once, rows kept, a section with its figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from support import refusal

from mlflow_projects.reproduce import __main__ as reproduce
from mlflow_projects.reproduce import convolution, networks

NAME = ("convolution",)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    (tmp_path / "data" / "cifar10").mkdir(parents=True)
    for name in networks.FILES:
        pixels = draw.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / "data" / name, x=pixels, y=np.arange(40) % 10)
    return {"data": tmp_path / "data", "output": tmp_path / "out", "samples": 16, "epochs": 1}


def run(given: dict[str, Any]) -> None:
    reproduce.main(["convolution", *(f"--{key}={value}" for key, value in given.items())])


def test_rows_a_figure_and_a_verdict(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given["budgets"] = "0.5,0.25"
    small = networks.NETWORKS["VGG"]._replace(
        build=lambda: networks.SmallVGG(networks.SmallVGGConfig((8, 0, 12, 16, 0), num_labels=10))
    )
    monkeypatch.setattr(convolution, "NETWORKS", {"VGG": small})
    monkeypatch.setattr(networks, "NETWORKS", {"VGG": small})
    run(given)
    out: Path = given["output"]
    held = json.loads((out / "convolution.json").read_text())
    assert len(held["rows"]) == 11
    for row in held["rows"]:
        assert row["MACs asked"] - 0.2 < row["MACs kept"] <= row["MACs asked"]
        assert 0 <= row["accuracy"] <= 1
    assert (out / "convolution.png").stat().st_size > 10_000
    section = (out / "RESULTS.md").read_text()
    assert "## convolution\n" in section and "The claim that an interpolative" in section
    assert "-e convolution " in section and "-P epochs=1" in section
    [finished] = mlflow.search_runs(output_format="list")
    assert finished.info.status == "FINISHED"
    assert {*finished.data.metrics} == {"VGG/accuracy", "macs_kept"}
    capsys.readouterr()
    trained = (out / "VGG-1-0" / "model.safetensors").stat().st_mtime_ns
    run(given)  # again: nothing is trained or measured
    assert "==" not in capsys.readouterr().out
    assert (out / "VGG-1-0" / "model.safetensors").stat().st_mtime_ns == trained
    message = refusal(reproduce, given | {"samples": 8}, capsys, NAME)
    assert "measured with another samples" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "/nowhere"}, "/nowhere/cifar10"),
        ({"samples": 41}, "samples 41 are more than the 40 training images. Lower it"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_bad_input_is_named_before_the_slow_part(
    given: dict[str, Any],
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refusal(reproduce, given | change, capsys, NAME)
    assert not given["output"].exists()
