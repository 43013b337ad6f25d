"""Bytes against perplexity as it runs: recipes in processes of their own, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mlflow_projects.bench.stacking import Point, main, plot

ROW = ["ratio", "bits", "way", "group_size", "bytes", "ppl_wikitext", "seconds"]


def test_points_are_measured_kept_and_drawn(
    bench_model: Path,
    bench_data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "stacking.json"
    given = [f"--model={bench_model}", f"--data={bench_data}", f"--output={output}"]
    given += ["--samples=8", "--sequence-length=64"]
    # A quarter of so small a module is not worth its place in a budget of multiples of 32.
    assert main([*given, "--bits=8,3", "--ratios=0.7"]) == 0
    found = json.loads(output.read_text())
    rows = {(row["ratio"], row["bits"]): row for row in found if row["way"] != "prune"}
    assert list(rows) == [(None, None), (None, 8), (None, 3), (0.7, 4)]
    [pruned] = [row for row in found if row["way"] == "prune"]
    assert (pruned["ratio"], pruned["bits"], pruned["group_size"]) == (0.7, 4, 64)
    settings = {"model": str(bench_model), "samples": 8, "sequence_length": 64}
    for row in rows.values():
        assert list(row) == [*ROW, *settings] and settings.items() <= row.items()
    assert [row["group_size"] for row in rows.values()] == [None, 64, 64, 32]
    assert pruned["bytes"] < rows[0.7, 4]["bytes"] and 200 < pruned["ppl_wikitext"] < 400
    size = {key: row["bytes"] for key, row in rows.items()}
    assert size[None, None] > size[None, 8] > size[None, 3] > 0
    assert size[None, 8] > size[0.7, 4]
    # Random letters, random weights: nobody knows better than 256 at random, but 3 bits.
    assert all(200 < row["ppl_wikitext"] < 400 for row in rows.values())
    recipe = yaml.safe_load((tmp_path / "stacking" / "id-0.7-4bit.yaml").read_text())
    assert recipe == Point(0.7, 4, "id").recipe()
    assert (tmp_path / "stacking.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*")) and "id-0.7-4bit" in capfd.readouterr().out

    assert main([*given, "--bits=8,3", "--ratios=0.7"]) == 0
    assert "0 points to measure, 5 in" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        main([*given[:3], "--samples=9", "--sequence-length=64"])
    assert "rows of another samples (8, now 9)" in capfd.readouterr().err
    # Groups of 32 do not divide a rank of 16, so nothing of this ratio can be quantized.
    status = main([*given, "--bits=8", "--ratios=0.05", "--ways=id"])
    printed = capfd.readouterr().out
    assert status == 1 and "failed: status 1; see" in printed
    assert "id-0.05-4bit" in printed and len(json.loads(output.read_text())) == 5


def test_every_number_of_bits_is_drawn() -> None:
    rows = [
        {"ratio": 0.8, "bits": bits, "bytes": 1e6 * bits, "ppl_wikitext": 30.0, "model": "/x/tiny"}
        for bits in range(1, 9)
    ]
    axes = plot(rows).axes[0]
    assert axes.get_title() == "tiny at equal bytes" and len(axes.get_legend().texts) == 8


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--bits=9"], "'9' is not a number of bits between 1 and 8"),
        (["--ways=svd"], "'svd' is none of id, prune"),
        (["--ratios=80"], "'80' is not a ratio between 0 and 1"),
        (["--data=/nowhere"], "lacks wikitext2-raw/wiki.valid.raw"),
        (["--samples=8"], "another model or calibration without --output"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], reason: str, bench_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([f"--data={bench_data}", *arguments])
    assert reason in capsys.readouterr().err


def test_a_foreign_file_is_not_overwritten(
    bench_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "notes.json"
    output.write_text('{"mine": 1}')
    with pytest.raises(SystemExit):
        main([f"--data={bench_data}", f"--output={output}"])
    assert "is not a list of measured rows" in capsys.readouterr().err
    assert output.read_text() == '{"mine": 1}'
