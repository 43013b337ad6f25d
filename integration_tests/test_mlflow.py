"""Every oneshot with a CUR stage is one MLflow run, in a real store."""

from __future__ import annotations

import csv
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from support import W4A16, Compress

from cur_modifier.forms.cur import CURLinear

CUR = {"rank": {"fixed": 32}, "layers": {"select": "angular", "count": 3}, "mlflow": True}


def only_run() -> Any:
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert len(runs) == 1
    return runs[0]


def artifact(run: Any, name: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=name))


def test_one_run_with_everything(tiny: Any, compress: Compress) -> None:
    compress(tiny, CUR, W4A16)
    run = only_run()
    assert run.info.status == "FINISHED"
    prefix = "compress_stage.cur_modifiers.CURModifier"
    assert run.data.params[f"{prefix}.rank.fixed"] == "32"
    metrics = run.data.metrics
    assert metrics["modules_factored"] == 9
    assert metrics["parameters_targets_after"] < metrics["parameters_targets_before"]
    assert metrics["ratio_targets"] == pytest.approx(
        metrics["parameters_targets_after"] / metrics["parameters_targets_before"]
    )
    assert metrics["bytes_model_after"] < metrics["bytes_model_before"]
    assert metrics["factoring_seconds"] > 0 and metrics["peak_rss_bytes"] > 0
    errors = mlflow.MlflowClient().get_metric_history(run.info.run_id, "relative_error")
    assert sorted(e.step for e in errors) == list(range(1, 10))

    rows = list(csv.DictReader(artifact(run, "layers.csv").open()))
    assert len(rows) == 9
    assert {"name", "rank", "relative_error", "seconds", "loss.cur_u"} <= rows[0].keys()
    assert all(float(row["loss.cur_c"]) >= 0 for row in rows)
    recipe = yaml.safe_load(artifact(run, "recipe.yaml").read_text())
    assert recipe["compress_stage"]["cur_modifiers"]["CURModifier"] == CUR
    assert "torch" in json.loads(artifact(run, "environment.json").read_text())
    for figure in ("spectra.png", "rank_map.png", "relative_error_map.png", "angular_distance.png"):
        assert artifact(run, figure).read_bytes().startswith(b"\x89PNG")


def test_the_report_is_one_page(tiny: Any, compress: Compress, tmp_path: Path) -> None:
    """Beside the checkpoint as in the run: figures, table, recipe, and nothing from elsewhere."""
    compress(tiny, CUR, W4A16)
    tiny.save_pretrained(tmp_path / "out")
    run = only_run()
    page = artifact(run, "report.html").read_text()
    assert (tmp_path / "out" / "report.html").read_text() == page
    assert run.info.run_id in page
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert "mlp.gate_proj" in page and "loss.cur_u" in page
    assert "fixed: 32" in page and metadata.version("torch") in page
    assert "vllm serve CHECKPOINT" in page


def test_joins_the_users_run(tiny: Any, compress: Compress) -> None:
    with mlflow.start_run() as mine:
        compress(tiny, CUR)
        assert mlflow.active_run().info.run_id == mine.info.run_id
        mlflow.log_metric("perplexity", 1.0)
    run = only_run()
    assert run.info.run_id == mine.info.run_id
    assert {"perplexity", "ratio_targets"} <= run.data.metrics.keys()


def test_one_switch_turns_it_off(tiny: Any, compress: Compress) -> None:
    compress(tiny, {**CUR, "mlflow": False})
    assert mlflow.search_runs(search_all_experiments=True, output_format="list") == []


def test_a_failing_stage_is_a_failed_run(tiny: Any, compress: Compress) -> None:
    tiny.model.layers[4].mlp.down_proj.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        compress(tiny, CUR)
    run = only_run()
    assert run.info.status == "FAILED"
    assert "NaN or infinity" in run.data.tags["error"]


def test_a_server_that_is_down_is_a_warning(tiny: Any, compress: Compress, log: list[str]) -> None:
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    compress(tiny, CUR)
    assert any(isinstance(module, CURLinear) for module in tiny.modules())
    assert len([line for line in log if "127.0.0.1:9" in line]) == 1
