"""Speed as it is measured: two real engines in turn, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from mlflow_projects.bench.serving import __main__ as bench
from mlflow_projects.bench.serving import comparison
from mlflow_projects.bench.serving.forms import DEFAULT, DENSE, MODELS, VARIANTS, Variant

TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
FIELDS = {
    "model": "tiny",
    "dtype": "float32",
    "form": "id",
    "ratio": 0.5,
    "quantization": None,
}


@pytest.mark.serve
@pytest.mark.slow
def test_rows_are_measured_kept_drawn_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    output = tmp_path / "serving.json"
    given = ["--models=tiny", "--variants=id-0.5", "--phases=load-1,decode-1,prefill-8"]
    given += ["--dtype=float32", "--repetitions=1", f"--output={output}"]
    assert bench.main(given) == 0
    loading, *rows = json.loads(output.read_text())
    assert (loading["phase"], loading["batch"]) == ("load", 1)
    assert loading["seconds"] > 0 and loading["speedup_over_dense"] > 0
    assert [(row["phase"], row["batch"]) for row in rows] == [("decode", 1), ("prefill", 8)]
    for row in rows:
        assert {name: row[name] for name in FIELDS} == FIELDS
        assert row["environment"]["OMP_WAIT_POLICY"] == "PASSIVE"
        assert row["tokens_per_second"] > 0 and row["speedup_over_dense"] > 0
        assert row["speedup_over_quantized"] is None
        assert 0 < row["linear_share"] < 1
        assert 0 < row["weight_bytes"] < row["dense_bytes"]
        assert 0.4 < row["projection_bytes_ratio"] < 0.51  # orders are bytes, too
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
    assert "id-0.5" in capsys.readouterr().out
    [run] = mlflow.search_runs(experiment_names=["cur_modifier-serving"], output_format="list")
    speed = rows[0]["speedup_over_dense"]
    assert run.data.metrics["tiny-float32/id-0.5/decode-1/speedup_over_dense"] == pytest.approx(
        speed
    )

    before = output.read_text()
    assert bench.main(given) == 0  # all is there: no engine is started
    assert output.read_text() == before


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.thorough
def test_a_quantized_variant_is_made_and_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setitem(VARIANTS, "none", Variant("id", 0.001))  # no rank is that small
    output = tmp_path / "serving.json"
    given = ["--models=tiny", "--variants=none,dense-W4A16", "--repetitions=1", "--no-mlflow"]
    given += ["--phases=load-1"]
    assert bench.main([*given, f"--output={output}"]) == 1
    [row] = json.loads(output.read_text())
    assert row["quantization"] == "W4A16" and row["phase"] == "load"
    assert row["weight_bytes"] < 0.5 * row["dense_bytes"]
    assert row["speedup_over_quantized"] is None  # dense in these bits is what it is
    said = capsys.readouterr().out
    assert "Failed: tiny id-0.001" in said and "tiny, dense-W4A16" in said


@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.thorough
def test_factored_and_quantized_is_measured_beside_dense_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = TINY | {"hidden_size": 256, "intermediate_size": 512}  # ranks are multiples of 64
    monkeypatch.setitem(MODELS, "tiny", wide)
    output = tmp_path / "serving.json"
    given = ["--models=tiny", "--variants=id-0.7-W4A16", "--repetitions=1", "--no-mlflow"]
    assert bench.main([*given, "--phases=decode-1", f"--output={output}"]) == 0
    [row] = json.loads(output.read_text())
    assert row["speedup_over_dense"] > 0 and row["speedup_over_quantized"] > 0
    said = capsys.readouterr().out
    assert "times dense W4A16" in said and "id-0.7-W4A16 ÷ dense-W4A16" in said


@pytest.mark.parametrize(
    ("variant", "beside"),
    [
        ("id-0.5", ["dense"]),
        ("dense-W4A16", ["dense"]),
        ("id-0.7-W4A16", ["dense", "dense-W4A16"]),
    ],
)
def test_what_a_variant_is_measured_beside(variant: str, beside: list[str]) -> None:
    assert [str(other) for other in comparison.compared(VARIANTS[variant])] == beside


def test_variants_are_measured_together_as_far_as_their_engines_fit() -> None:
    default = [VARIANTS[name] for name in DEFAULT]
    assert comparison.measured_together(default) == [default]
    groups = comparison.measured_together(list(VARIANTS.values()))
    assert [variant for group in groups for variant in group] == list(VARIANTS.values())
    for group in groups:
        engines = comparison.with_compared(group)
        assert engines[0] == DENSE and set(group) <= set(engines)
        assert len(engines) == len(set(engines)) <= comparison.MOST_ENGINES


def test_a_model_that_does_not_load_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(EOFError),
        comparison.engine(tmp_path / "nothing", "float32"),
    ):
        pass
    assert "nothing" in (tmp_path / "nothing.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--variants=id-0.4"], "unknown id-0.4; choose from id-0.8"),
        (["--models=gpt"], "unknown gpt; choose from llama-1b, smollm2"),
        (["--phases=decode"], "unknown decode; choose from load-1, decode-1"),
        (["--repetitions=0"], "at least 1 is needed"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert reason in capsys.readouterr().err


def test_every_variant_has_a_name_of_its_own() -> None:
    assert len({str(variant) for variant in VARIANTS.values()}) == len(VARIANTS)
