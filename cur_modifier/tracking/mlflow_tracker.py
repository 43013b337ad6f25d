"""The tracker that writes to MLflow."""

from __future__ import annotations

import csv
import functools
import io
import math
import posixpath
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from loguru import logger

from cur_modifier.tracking import flatten as flat
from cur_modifier.tracking.recording import Recording
from cur_modifier.tracking.tracker import Tracker, never_raises

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

_DOTS_PER_INCH = 150

P = ParamSpec("P")


class MlflowTracker(Tracker):
    """Prepares records in the caller's thread and leaves the sending to the recording's worker.

    The preparation (flatten, draw, write the CSV) takes a snapshot: the caller may change what it
    passed as soon as the call returns.
    """

    run_id: str

    def __init__(self, recording: Recording) -> None:
        self.run_id = recording.run_id
        self._recording = recording
        self._client = recording.client
        finalizer = weakref.finalize(self, recording.abandon)
        # At exit the recording's own hook closes the run, because that has to wait.
        finalizer.atexit = False

    @never_raises
    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [
            Param(key, flat.cut(value, flat.MAX_PARAM_VALUE_LENGTH, key=key))
            for key, value in flat.flatten(params).items()
        ]
        self._submit("parameters", _send_params, entries)

    @never_raises
    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        values = {key: float(value) for key, value in flat.unique_keys(metrics.items()).items()}
        dropped = [key for key, value in values.items() if not math.isfinite(value)]
        if dropped:
            logger.warning(
                f"MLflow: {len(dropped)} metrics are not finite and are left out of run "
                f"{self.run_id}: {', '.join(dropped[:5])}{', ...' if dropped[5:] else ''}"
            )
        entries = [
            Metric(key, value, now_ms, step or 0)
            for key, value in values.items()
            if math.isfinite(value)
        ]
        self._submit("metrics", _send_metrics, entries)

    @never_raises
    def log_text(self, text: str, artifact: str) -> None:
        self._submit(artifact, _send_file, text.encode("utf-8", "replace"), artifact)

    @never_raises
    def log_table(self, rows: Sequence[Mapping[str, Any]], artifact: str) -> None:
        if not artifact.endswith(".csv"):
            raise ValueError(f"a table needs an artifact name that ends in .csv, got {artifact!r}")
        if not rows:
            return
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [_plain(row.get(name)) for row in rows] for name in names}
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(zip(*columns.values(), strict=True))
        self._submit(artifact, _send_file, text.getvalue().encode(), artifact)
        table = str(PurePosixPath(artifact).with_suffix(".json"))
        self._submit(table, _send_table, columns, table)

    @never_raises
    def log_figure(self, figure: Figure, artifact: str) -> None:
        # Drawn here, because matplotlib is not safe to use from two threads.
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_DOTS_PER_INCH, bbox_inches="tight")
        self._submit(artifact, _send_file, png.getvalue(), artifact)

    @never_raises
    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [
            RunTag(key, flat.cut(str(value), flat.MAX_TAG_VALUE_LENGTH, key=key))
            for key, value in flat.unique_keys(tags.items()).items()
        ]
        self._submit("tags", _send_tags, entries)

    @never_raises
    def finish(self, *, error: BaseException | str | None = None) -> None:
        if isinstance(error, BaseException):
            error = f"{type(error).__name__}: {error}"
        self._recording.close(error)
        self._recording.wait()

    def _submit(
        self,
        what: str,
        send: Callable[Concatenate[MlflowClient, str, P], None],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        job = functools.partial(send, self._client, self.run_id, *args, **kwargs)
        self._recording.submit(what, job, artifact=send in (_send_file, _send_table))


# What follows runs in the worker's thread. `synchronous` overrules MLFLOW_ENABLE_ASYNC_LOGGING,
# under which MLflow would swallow the failures.


def _send_params(client: MlflowClient, run_id: str, params: list[Param]) -> None:
    # MLflow refuses a whole batch for one parameter that has another value already, as it has
    # where two compressions join one run.
    present = client.get_run(run_id).data.params
    kept = [param.key for param in params if present.get(param.key, param.value) != param.value]
    if kept:
        logger.warning(
            f"MLflow: run {run_id} has other values already for {len(kept)} parameters, which it "
            f"keeps ({', '.join(kept[:5])}{', ...' if kept[5:] else ''}). Give each compression "
            "its own run, for instance with mlflow.start_run(nested=True)."
        )
    new = [param for param in params if param.key not in present]
    for batch in flat.batches(
        new, count=flat.MAX_PARAMS_PER_BATCH, text=lambda param: param.key + param.value
    ):
        client.log_batch(run_id, params=batch, synchronous=True)


def _send_metrics(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
    for batch in flat.batches(
        metrics, count=flat.MAX_METRICS_PER_BATCH, text=lambda metric: metric.key
    ):
        client.log_batch(run_id, metrics=batch, synchronous=True)


def _send_tags(client: MlflowClient, run_id: str, tags: list[RunTag]) -> None:
    for batch in flat.batches(
        tags, count=flat.MAX_PARAMS_PER_BATCH, text=lambda tag: tag.key + tag.value
    ):
        client.log_batch(run_id, tags=batch, synchronous=True)


def _send_file(client: MlflowClient, run_id: str, content: bytes, artifact: str) -> None:
    artifact = _free_name(client, run_id, artifact)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, posixpath.basename(artifact))
        path.write_bytes(content)
        client.log_artifact(run_id, str(path), posixpath.dirname(artifact) or None)


def _send_table(
    client: MlflowClient, run_id: str, columns: dict[str, list[Any]], artifact: str
) -> None:
    # A free name, because log_table appends to a table that is there.
    client.log_table(run_id, data=columns, artifact_file=_free_name(client, run_id, artifact))


def _free_name(client: MlflowClient, run_id: str, artifact: str) -> str:
    """``artifact``, or ``name_2.ext``, ``name_3.ext`` ... where the run has it already."""
    folder = posixpath.dirname(artifact)
    taken = {file.path for file in client.list_artifacts(run_id, folder or None)}
    stem, suffix = posixpath.splitext(artifact)
    free, number = artifact, 1
    while free in taken:
        number += 1
        free = f"{stem}_{number}{suffix}"
    return free


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else str(value)
