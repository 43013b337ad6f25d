"""The quality benchmark as it runs, protocol and all, on a tiny model and random text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cur_modifier.rows import read_rows
from mlflow_projects.bench.quality.__main__ import main
from mlflow_projects.bench.quality.calibration import (
    Calibration,
    input_statistics,
    kept_statistics,
    projections,
)
from mlflow_projects.bench.quality.methods import METHODS
from mlflow_projects.bench.quality.protocol import calibration_windows, evaluation_windows
from mlflow_projects.bench.quality.results import key

LAYERS = 3  # of bench_model; too few for CURing's ten


@pytest.fixture
def run(bench_model: Path, bench_data: Path, tmp_path: Path) -> Any:
    """The command with the tiny model; gives its exit status and its rows."""
    output = tmp_path / "quality.json"

    def command(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        status = main(
            [f"--model={bench_model}", f"--data={bench_data}", f"--output={output}", *arguments]
        )
        return status, read_rows(output, key)

    return command


def test_texts_are_those_of_the_protocol(bench_model: Path, bench_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench_model)

    def letters(windows: torch.Tensor) -> set[str]:
        return set(tokenizer.decode(windows.flatten())) - set("\n")

    calibration = {n: calibration_windows(n, bench_data, tokenizer) for n in ("wikitext", "c4")}
    evaluation = evaluation_windows(bench_data, tokenizer)
    held_out = evaluation_windows(bench_data, tokenizer, held_out=True)
    assert {n: tuple(w.shape) for n, w in calibration.items()} == {
        "wikitext": (64, 1024),
        "c4": (64, 1024),
    }
    assert {n: tuple(w.shape) for n, w in (evaluation | held_out).items()} == {
        "wikitext": (24, 1024),
        "c4": (24, 1024),
        "held_out": (8, 1024),
    }
    assert {n: letters(w) for n, w in calibration.items()} == {
        "wikitext": set("calibrate"),
        "c4": set("first"),
    }
    assert {n: letters(w) for n, w in (evaluation | held_out).items()} == {
        "wikitext": set("test"),
        "c4": set("LAST"),
        "held_out": set("HELD OUT"),
    }


def test_statistics_are_those_of_what_every_projection_reads(bench_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bench_model)
    windows = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(1))
    statistics = input_statistics(model, windows)
    read: dict[str, torch.Tensor] = {}
    for name, linear in projections(model).items():
        linear.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    assert set(read) == set(statistics) and len(read) == 7 * LAYERS
    for name, x in read.items():
        rows = x.flatten(0, -2)
        for seen, wanted in (
            (statistics[name].gram, rows.mT @ rows / len(rows)),
            (statistics[name].mean_abs, rows.abs().mean(dim=0)),
        ):  # the products of the pass are in half precision
            assert (seen - wanted).norm() < 0.02 * wanted.norm()


def test_statistics_are_left_for_the_rows_that_follow(bench_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bench_model)
    windows = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    first, second = (Calibration(windows, tmp_path / "wikitext.pt") for _ in range(2))
    found = kept_statistics(model, first)
    read = kept_statistics(model, second)
    assert [file.name for file in tmp_path.iterdir()] == ["wikitext.pt"]
    assert first.spared_seconds == first.spared_peak == 0
    assert second.spared_seconds > 0 and second.spared_peak > 10**8
    assert found.keys() == read.keys()
    for name, inputs in found.items():
        assert torch.equal(read[name].gram, inputs.gram)
        assert torch.equal(read[name].mean_abs, inputs.mean_abs)


@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if not method.own_ratio])
def test_every_method_reaches_its_ratio(name: str, bench_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bench_model)
    windows = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        dense = model(windows).logits
    ratio = METHODS[name].compress(model, Calibration(windows), 0.7)
    assert 0.6 < ratio <= 0.7  # ranks are whole numbers, and these matrices are small
    with torch.no_grad():
        compressed = model(windows).logits
    assert torch.isfinite(compressed).all() and not torch.allclose(compressed, dense)


def test_rows_are_measured_kept_and_measured_again(
    run: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    some = ("--methods=dense,svd-llm", "--calibrations=c4")
    status, rows = run(*some, "--ratios=0.8")
    assert status == 0
    assert [(r["method"], r["ratio"], r["calibration"]) for r in rows] == [
        ("dense", None, "c4"),
        ("svd-llm", 0.8, "c4"),
    ]
    for row in rows:
        assert list(row) == [
            "method",
            "ratio",
            "calibration",
            "ppl_wikitext",
            "ppl_c4",
            "stored_ratio",
            "seconds",
            "peak_rss_bytes",
            "model",
        ]
        assert 150 < row["ppl_wikitext"] < 350 and 150 < row["ppl_c4"] < 350  # 256 at random
        assert row["peak_rss_bytes"] > 10**8
    assert rows[0]["stored_ratio"] == 1 and 0.7 < rows[1]["stored_ratio"] <= 0.8

    status, more = run(*some, "--ratios=0.8,0.6")
    assert status == 0 and more[:2] == rows and more[2]["ratio"] == 0.6
    assert "1 rows to measure, 2 in" in capfd.readouterr().out

    with pytest.raises(SystemExit):  # held-out text is no test text
        run(*some, "--held-out")
    assert "rows of another held_out" in capfd.readouterr().err

    status, again = run(*some, "--ratios=0.6", "--methods=svd-llm", "--again")
    assert [r["ratio"] for r in again] == [None, 0.8, 0.6]
    assert again[2]["ppl_c4"] == more[2]["ppl_c4"] and again[2]["seconds"] != more[2]["seconds"]


def test_one_that_fails_leaves_the_others(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    status, rows = run("--methods=curing,svd", "--ratios=0.8", "--calibrations=c4", "--held-out")
    assert status == 1
    assert [row["method"] for row in rows] == ["svd"]
    assert "ppl_held_out" in rows[0] and "ppl_wikitext" not in rows[0]
    printed = capfd.readouterr()
    assert "ValueError: layers.count is 10, but the model has" in printed.err
    assert "failed: its process ended with status 1" in printed.out
    assert printed.out.splitlines()[-1].endswith("same command: curing, calibrated on c4")
