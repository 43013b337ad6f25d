"""Our runs as a user sees them: MLflow's own pages from a real server, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from support import Compress

from tools.mlflow_ui import FIGURES, MlflowServer, browser, chromium, open_comparison, open_figure

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium: apt install chromium")

RANKS = (16, 32)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(f"sqlite:///{tmp_path / 'server.db'}", tmp_path)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def test_two_compressions_are_compared_and_looked_at(
    tiny_checkpoint: Path, tiny: Any, compress: Compress, server: MlflowServer, tmp_path: Path
) -> None:
    mlflow.set_tracking_uri(server.uri)
    for rank in RANKS:
        model = type(tiny).from_pretrained(tiny_checkpoint)
        layers = {"select": "angular", "count": 3}
        compress(model, {"rank": {"fixed": rank}, "layers": layers, "mlflow": True})
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert [run.info.status for run in runs] == ["FINISHED"] * len(RANKS)
    experiment = runs[0].info.experiment_id
    with browser() as page:
        open_comparison(page, server.uri, experiment, [run.info.run_id for run in runs])
        text = page.inner_text("body")
        assert all(run.info.run_name in text for run in runs)
        assert "compress_stage.cur_modifiers.CURModifier.rank.fixed" in text
        for run in runs:
            assert f"{run.data.metrics['ratio_targets']:.3g}" in text
        for figure in FIGURES:
            open_figure(page, server.uri, experiment, runs[0].info.run_id, figure)
    report = mlflow.artifacts.download_artifacts(
        run_id=runs[0].info.run_id, artifact_path="report.html", dst_path=str(tmp_path)
    )
    with browser() as page:
        page.goto(Path(report).as_uri())
        assert page.locator("img").count() == 4
        header = page.locator("table.sortable th", has_text="relative_error")
        column = header.evaluate("th => th.cellIndex") + 1
        for descending in (False, True):
            header.get_by_role("button").click()
            cells = page.locator(f"table.sortable tbody tr > :nth-child({column})")
            errors = [float(text) for text in cells.all_inner_texts()]
            assert len(errors) == 9 and errors == sorted(errors, reverse=descending)
