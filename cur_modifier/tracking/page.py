"""One run as one HTML page that needs nothing else: figures inline, tables that sort."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from cur_modifier.tracking.environment import environment
from cur_modifier.tracking.tracker import Tracker, never_raises

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Page"]

_DOTS_PER_INCH = 110


class Page(Tracker):
    """Keeps what is logged, for a page, and passes it on.

    Args:
        inner: what writes the run, or a ``NullTracker``: the page is made all the same.
        title: of the page.
    """

    def __init__(self, inner: Tracker, title: str) -> None:
        self._inner = inner
        self._title = title
        self._metrics: dict[str, float] = {}
        self._texts: dict[str, str] = {}
        self._tables: dict[str, list[dict[str, Any]]] = {}
        self._figures: dict[str, str] = {}

    @property
    def run_id(self) -> str | None:  # type: ignore[override]
        """The run that is written besides."""
        return self._inner.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._inner.log_params(params)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        if step is None:  # a series is drawn, not listed
            self._metrics.update(metrics)
        self._inner.log_metrics(metrics, step=step)

    def log_text(self, text: str, artifact: str) -> None:
        self._texts[artifact] = text
        self._inner.log_text(text, artifact)

    def log_table(self, rows: Sequence[Mapping[str, Any]], artifact: str) -> None:
        self._tables[artifact] = [dict(row) for row in rows]
        self._inner.log_table(rows, artifact)

    @never_raises
    def log_figure(self, figure: Figure, artifact: str) -> None:
        self._inner.log_figure(figure, artifact)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_DOTS_PER_INCH, bbox_inches="tight")
        self._figures[artifact] = base64.b64encode(png.getvalue()).decode()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._inner.set_tags(tags)

    def finish(self, *, error: BaseException | str | None = None) -> None:
        self._inner.finish(error=error)

    def html(self) -> str:
        """What was logged so far, as one page without a link to anything outside it."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        templates = Environment(
            loader=PackageLoader("cur_modifier.tracking", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        templates.filters["number"] = _number
        return templates.get_template("page.html.j2").render(
            title=self._title,
            run_id=self.run_id,
            metrics=self._metrics,
            texts=self._texts,
            tables={name: (_columns(rows), rows) for name, rows in self._tables.items() if rows},
            figures=[
                (PurePosixPath(n).stem.replace("_", " "), f) for n, f in self._figures.items()
            ],
            environment=environment(),
        )


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that hold anything, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row if row[key] is not None))


def _number(value: Any) -> Any:
    """Six digits, whole numbers with their thousands apart; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else value
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.6g}"
