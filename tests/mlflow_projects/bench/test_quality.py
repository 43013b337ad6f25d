"""The harness around the methods: rows on disk, tables, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cur_modifier.rows import Row, put_row, read_rows
from mlflow_projects.bench.quality.__main__ import jobs, main, parse
from mlflow_projects.bench.quality.methods import METHODS
from mlflow_projects.bench.quality.protocol import missing_files
from mlflow_projects.bench.quality.results import format_tables, key, plot


def row(method: str = "svd", ratio: float | None = 0.8, ppl: float = 20.0, **fields: object) -> Row:
    return {
        "method": method,
        "ratio": ratio,
        "calibration": "wikitext",
        "ppl_wikitext": ppl,
        "ppl_c4": 2 * ppl,
        "stored_ratio": 0.79,
        "seconds": 1.0,
        "peak_rss_bytes": 10**9,
        **fields,
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the names of the texts; nothing here reads them."""
    for file in missing_files(tmp_path):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_rows_of_the_same_measurement_are_replaced_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "new" / "quality.json"
    assert read_rows(path, key) == []
    first = [row(), row(ratio=0.9), row("curing", None), row(calibration="c4")]
    for one in first:
        put_row(path, one, key)
    again = row(ppl=19.0)
    put_row(path, again, key)
    assert json.loads(path.read_text()) == [*first[1:], again]
    assert [p.name for p in path.parent.iterdir()] == ["quality.json"]


def test_table_has_a_line_a_method_and_a_column_a_ratio() -> None:
    rows = [row(ratio=0.9), row(ppl=2e5), row("curing", None, 94.2), row("mine"), row("a", 0.8)]
    table = format_tables([*rows, row(calibration="c4", ppl=7)], ["curing", "svd"])
    blocks = [block.splitlines() for block in table.split("\n\n")]
    assert [block[0].split(";")[0] for block in blocks] == [
        f"Perplexity on {text}, calibrated on {calibration}"
        for calibration in ("wikitext", "c4")
        for text in ("wikitext", "c4")
    ]
    assert [line.split() for line in blocks[0][1:]] == [
        ["0.9", "0.8", "its", "own"],
        ["curing", "94.20", "at", "0.790"],
        ["svd", "20.00", "2.0e+05"],
        ["a", "20.00"],
        ["mine", "20.00"],
    ]
    assert [line.split() for line in blocks[2][1:]] == [["0.8"], ["svd", "7.00"]]
    assert format_tables([], ["svd"]) == ""


def test_rows_of_held_out_text_have_tables_too() -> None:
    held_out = {k: v for k, v in row().items() if not k.startswith("ppl_")} | {"ppl_held_out": 3.0}
    assert format_tables([held_out], ["svd"]).startswith("Perplexity on held_out")


def test_plot_has_a_panel_a_text_and_a_line_a_method() -> None:
    rows = [
        row("dense", None, 15.0),
        *(row("mine", ratio, 20 / ratio, stored_ratio=ratio) for ratio in (0.6, 0.8)),
        row("svd", 0.8, 2e5),
        row("svd", 0.8, calibration="c4"),
    ]
    figure = plot(rows, ["dense", "svd"])
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == [
        f"on {text}, calibrated on {calibration}"
        for calibration in ("wikitext", "c4")
        for text in ("wikitext", "c4")
    ]
    lines = {
        line.get_label(): line.get_xydata().tolist()
        for line in panels["on c4, calibrated on wikitext"].get_lines()
    }
    assert list(lines) == ["svd", "mine", "dense"]
    assert lines["mine"] == [[0.6, 40 / 0.6], [0.8, 40 / 0.8]]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["svd", "mine", "dense"]


def test_what_exists_is_not_measured_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "quality.json"
    put_row(output, row(), key)
    arguments = ["--methods=svd", "--ratios=0.80", "--calibrations=wikitext"]
    assert main([*arguments, f"--data={data}", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "0 rows to measure, 1 in" in printed and "20.00" in printed
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_jobs_are_one_a_method_with_its_own_ratio(data: Path) -> None:
    options = parse(["--methods", "svd curing", "--ratios", "0.9, 0.6,0.9", f"--data={data}"])
    assert [(j.method, j.ratio, j.calibration) for j in jobs(options)] == [
        (method, ratio, calibration)
        for calibration in ("wikitext", "c4")
        for method, ratio in (("svd", 0.9), ("svd", 0.6), ("curing", None))
    ]
    rows = [row(j.method, j.ratio, calibration=j.calibration) for j in jobs(options)]
    assert len({key(r) for r in rows}) == len(rows)


def test_all_is_the_default_and_held_out_rows_have_a_file_of_their_own(data: Path) -> None:
    options = parse([f"--data={data}"])
    assert options.methods == list(METHODS) and options.ratios == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert parse(["--held-out", f"--data={data}"]).output != options.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods=svd,svd-lm"], ["svd-lm", "choose from", "svd-llm"]),
        (["--methods=,"], ["','", "choose from"]),
        (["--calibrations=pile"], ["pile", "wikitext, c4"]),
        (["--ratios=0.9,1"], ["ratio 1 ", "(0, 1)", "stored after"]),
        (["--ratios=nan"], ["ratio nan "]),
        (["--ratios=0.9;0.8"], ["'0.9;0.8'", "0.9,0.8"]),
        (["--ratios="], ["'' is not a number"]),
        (["--model=somewhere"], ["somewhere", "--output"]),
        (["--model=somewhere", "--output=x.json"], ["somewhere", "config.json"]),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], words: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal([*arguments, f"--data={data}"], capsys)
    assert all(word in message for word in words), message


def test_absent_data_is_refused_by_name(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "wikitext2-raw" / "wiki.valid.raw").unlink()
    message = refusal([f"--data={data}"], capsys)
    assert f"{data} lacks wikitext2-raw/wiki.valid.raw:" in message and "DATA=" in message


@pytest.mark.parametrize("content", ["[{", "{}x", '[{"method": "svd"}]', "[1]", "1"])
def test_a_file_of_something_else_is_refused(
    content: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = data / "quality.json"
    output.write_text(content)
    message = refusal([f"--data={data}", f"--output={output}"], capsys)
    assert str(output) in message and "--output" in message
    assert output.read_text() == content


def test_wrong_arguments_are_refused_before_torch_is_imported(data: Path) -> None:
    code = (
        "import sys\n"
        "from mlflow_projects.bench.quality.__main__ import parse\n"
        "try:\n"
        f"    parse(['--data', {str(data)!r}, '--model', '/nowhere', '--output', 'x.json'])\n"
        "finally:\n"
        "    assert not {'torch', 'llmcompressor'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "is not a model's directory" in done.stderr
