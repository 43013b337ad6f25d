"""MLflow's own pages of our runs in a headless Chromium, for tests and for the README.

    python tools/mlflow_ui.py sqlite:///mlflow.db --runs 4 --output screenshots

Starts an ``mlflow server`` on loopback over the store, opens the page that compares the newest runs
that factored something and the figures of the newest one, and writes a PNG of each. Needs an
installed Chromium (``apt install chromium``); nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.vllm_server import free_port

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = ["MlflowServer", "browser", "chromium", "open_comparison", "open_figure"]

START_S = 120
PAGE_MS = 60_000  # MLflow's pages load several megabytes of scripts
# The metrics are two boxes, of names and of values, that show six rows and scroll each by itself.
SHOW_ALL_ROWS = """() => {
  for (const box of document.querySelectorAll("div"))
    if (100 < box.clientHeight && box.clientHeight < 500 && box.clientHeight < box.scrollHeight) {
      box.style.maxHeight = "none";
      box.style.height = "auto";
    }
}"""
FIGURES = ("spectra.png", "rank_map.png", "relative_error_map.png")


class MlflowServer:
    """An ``mlflow server`` on a free loopback port, in ``folder``, over the store of ``uri``.

    Started by the constructor, so that several may start side by side; :meth:`wait` for it.
    """

    def __init__(self, uri: str, folder: Path) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        self._log = folder / "server.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                    *("--host", "127.0.0.1", "--port", str(port)),
                    *("--backend-store-uri", uri),
                    *("--artifacts-destination", str(folder / "artifacts")),
                ],
                cwd=folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,  # the server is a process with children
            )

    def wait(self) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it ended, or did not answer in time; with its log.
        """
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"mlflow server did not start:\n{self._log.read_text()}")

    def kill(self) -> None:
        """End it and its children, at once; a second call does nothing."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def chromium() -> str | None:
    """Path of an installed Chromium or Chrome, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def browser(width: int = 1400, height: int = 900) -> Iterator[Page]:
    """An empty page of a headless Chromium that reaches for nothing by itself.

    Raises:
        FileNotFoundError: none is installed.
    """
    from playwright.sync_api import sync_playwright

    program = chromium()
    if program is None:
        raise FileNotFoundError("no Chromium on the PATH. Install one: apt install chromium.")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        try:
            page = running.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(PAGE_MS)
            yield page
        finally:
            running.close()


def open_comparison(page: Page, server: str, experiment: str, runs: Sequence[str]) -> None:
    """MLflow's page that compares ``runs``, until the metrics of all are there."""
    query = urllib.parse.quote(str(list(runs)).replace("'", '"'))
    experiments = urllib.parse.quote(f'["{experiment}"]')
    page.goto(f"{server}/#/compare-runs?runs={query}&experiments={experiments}")
    page.get_by_text("ratio_targets", exact=True).first.wait_for()


def open_figure(page: Page, server: str, experiment: str, run: str, figure: str) -> None:
    """The figure among a run's artifacts, until its pixels are there."""
    page.goto(f"{server}/#/experiments/{experiment}/runs/{run}/artifacts/{figure}")
    page.wait_for_function(
        "() => [...document.images].some(i => i.naturalWidth > 300 && i.complete)"
    )


def main() -> None:
    """Photograph the pages."""
    parser = argparse.ArgumentParser(
        prog="mlflow_ui", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", help="URI of a tracking store, e.g. sqlite:///mlflow.db")
    parser.add_argument("--runs", type=int, default=4, help="to compare, the newest first")
    parser.add_argument("--output", type=Path, default=Path("screenshots"))
    options = parser.parse_args()
    # The server runs in another folder.
    scheme, slashes, path = options.store.partition("sqlite:///")
    if slashes and not scheme:
        options.store = f"sqlite:///{Path(path).resolve()}"
    import mlflow

    mlflow.set_tracking_uri(options.store)
    runs = mlflow.search_runs(
        search_all_experiments=True,
        filter_string="metrics.ratio_targets > 0 AND attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=options.runs,
        output_format="list",
    )
    if len(runs) < 2:
        parser.error(f"{options.store} holds {len(runs)} finished compressions; two are compared.")
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = MlflowServer(options.store, Path(folder))
        try:
            server.wait()
            photograph(server.uri, runs, options.output)
        finally:
            server.kill()


def photograph(server: str, runs: Sequence[Any], output: Path) -> None:
    """``compare.png`` of all ``runs``, ``run.png`` of the first one's artifacts."""
    newest = runs[0].info
    with browser(height=1340) as page:
        open_comparison(page, server, newest.experiment_id, [run.info.run_id for run in runs])
        for button in ("Close", "Visualizations", "Parameters"):  # the assistant, and long sections
            page.get_by_role("button", name=button, exact=True).first.click()
        page.evaluate(SHOW_ALL_ROWS)
        page.mouse.move(0, 0)
        page.screenshot(path=output / "compare.png", animations="disabled")
        page.set_viewport_size({"width": 1400, "height": 520})
        open_figure(page, server, newest.experiment_id, newest.run_id, FIGURES[-1])
        page.screenshot(path=output / "run.png", animations="disabled")
    print(f"In {output}: compare.png, run.png")


if __name__ == "__main__":
    main()
