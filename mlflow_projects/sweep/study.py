"""The study of a sweep: its trials on disk, its runs in MLflow, and what is left to do."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_projects.sweep.space import Point

STUDY = "sweep"
CHECKPOINT = "checkpoint"  # in the folder of a trial
# What a continued sweep must share with the one that began: its figures would not compare.
SETTINGS = (
    "model",
    "data",
    "text",
    "samples",
    "sequence_length",
    "windows",
    "window_length",
    "dtype",
    "group_size",
    "seed",
)


class SweepError(RuntimeError):
    """The sweep can't go on; the message says why and what to do."""


@dataclass(frozen=True)
class Done:
    """A finished trial."""

    number: int
    point: Point
    bytes: float
    perplexity: float
    seconds: float
    run_id: str
    model_id: str


class Sweep:
    """The study on disk, the parent run in MLflow, and what is left to do."""

    def __init__(self, options: argparse.Namespace) -> None:
        import optuna

        self._options = options
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        options.output.mkdir(parents=True, exist_ok=True)
        sampler = (
            optuna.samplers.TPESampler(seed=options.seed, n_startup_trials=8)
            if options.search == "tpe"
            else None
        )
        self._study = optuna.create_study(
            storage=f"sqlite:///{options.output / 'study.db'}",
            study_name=STUDY,
            directions=["minimize", "minimize"],
            load_if_exists=True,
            sampler=sampler,
        )
        self._states = optuna.trial.TrialState
        settings = {name: getattr(options, name) for name in SETTINGS}
        earlier = self._study.user_attrs.get("settings", settings)
        changed = [name for name in SETTINGS if earlier[name] != settings[name]]
        if changed:
            raise SweepError(
                f"{options.output} holds a sweep with another "
                + ", ".join(f"{n} ({earlier[n]}, now {settings[n]})" for n in changed)
                + ": its figures would not compare. Give another output, or the same settings."
            )
        self._study.set_user_attr("settings", settings)

    def run(self) -> None:
        """All trials that are left; the parent run is the one that began the sweep."""
        import mlflow

        began = self._study.user_attrs.get("run_id")
        given = os.environ.get("MLFLOW_RUN_ID")
        if began is not None and began != given and given is not None:
            # `mlflow run` has made a run of its own; it points to the one that is continued.
            mlflow.MlflowClient().set_tag(given, "continues", began)
        with mlflow.start_run(run_id=began or given) as parent:
            self._study.set_user_attr("run_id", parent.info.run_id)
            self._parent = parent.info
            self._recover()
            self._draw()
            while (trial := self._next()) is not None:
                self._one(trial)
                self._draw()
            self._prune()
        print(_table(self.done(), self._front()))
        failed = self._failed()
        if failed:
            print(f"{len(failed)} failed: {', '.join(failed)}. Start again to try them once more.")
        print(f"MLflow run {self._parent.run_id}; study and checkpoints in {self._options.output}")
        if not self.done():
            raise SweepError("no trial came to its end.")

    def done(self) -> list[Done]:
        """The finished trials, in their order."""
        return [
            Done(
                number=trial.number,
                point=Point(**trial.user_attrs["point"]),
                bytes=trial.values[0],
                perplexity=trial.values[1],
                seconds=trial.user_attrs["seconds"],
                run_id=trial.user_attrs["run_id"],
                model_id=trial.user_attrs["model_id"],
            )
            for trial in self._study.get_trials(states=(self._states.COMPLETE,))
            if "same_as" not in trial.user_attrs
        ]

    def _recover(self) -> None:
        """Queue what an earlier start left: cut off, failed, and, in a grid, not begun."""
        import mlflow

        client = mlflow.MlflowClient()
        for trial in self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            self._study.tell(trial.number, state=self._states.FAIL)
            if "run_id" in trial.user_attrs:
                client.set_terminated(trial.user_attrs["run_id"], "KILLED")
                self._drop(trial.number, Point(**trial.user_attrs["point"]))
        known = {done.point for done in self.done()} | self._waiting()
        wanted = [
            Point(**trial.user_attrs["point"])
            for trial in self._study.get_trials(states=(self._states.FAIL,))
            if "point" in trial.user_attrs
        ]
        if self._options.search == "grid":
            wanted += self._options.points
        for point in dict.fromkeys(wanted):
            if point not in known and point in self._options.points:
                self._study.enqueue_trial(point.params(), user_attrs={"point": point.params()})

    def _waiting(self) -> set[Point]:
        waiting = self._study.get_trials(states=(self._states.WAITING,))
        return {Point(**t.user_attrs["point"]) for t in waiting if "point" in t.user_attrs}

    def _next(self) -> Any | None:
        """One that waits, else one that the search suggests; None when all are done."""
        while self._waiting():
            trial = self._study.ask()
            if self._point(trial) in self._options.points:
                return trial
            # An earlier start queued it, and this one does not ask for it.
            self._study.tell(trial, state=self._states.FAIL)
        ended = self._study.get_trials(states=(self._states.COMPLETE, self._states.FAIL))
        # One that was cut off has no error, and runs again.
        tried = sum(t.state is self._states.COMPLETE or "error" in t.user_attrs for t in ended)
        if self._options.search == "tpe" and tried < self._options.trials:
            return self._study.ask()
        return None

    def _point(self, trial: Any) -> Point:
        """What is suggested, as one choice among the points: the axes depend on each other."""
        if "point" in trial.user_attrs:
            return Point(**trial.user_attrs["point"])
        form = trial.suggest_categorical("form", sorted({p.form for p in self._options.points}))
        of_form = [p for p in self._options.points if p.form == form]
        selections = sorted({p.selection for p in of_form})
        ratios = sorted({p.ratio for p in of_form})
        return Point(
            form,
            trial.suggest_categorical(f"selection of {form}", selections),
            trial.suggest_categorical(f"ratio of {form}", ratios),
            trial.suggest_categorical("quantization", list(self._options.quantizations)),
        )

    def _one(self, trial: Any) -> None:
        """Run one trial in a process of its own; one that fails stops no other."""
        import mlflow

        point = self._point(trial)
        trial.set_user_attr("point", point.params())
        twin = next((done for done in self.done() if done.point == point), None)
        if twin is not None:  # the search asks again for what is known
            trial.set_user_attr("same_as", twin.number)
            self._study.tell(trial, [twin.bytes, twin.perplexity])
            return
        options = self._options
        folder = self._folder(trial.number, point)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        client = mlflow.MlflowClient()
        run = client.create_run(
            self._parent.experiment_id,
            run_name=str(point),
            tags={"mlflow.parentRunId": self._parent.run_id},
        )
        trial.set_user_attr("run_id", run.info.run_id)
        request = folder / "request.json"
        request.write_text(
            json.dumps(
                {name: getattr(options, name) for name in SETTINGS}
                | {
                    "name": str(point),
                    "params": point.params(),
                    "recipe": point.recipe(options.group_size, options.seed),
                    "folder": str(folder),
                }
            )
        )
        done = len(self.done())
        print(f"\n== trial {trial.number}, {done} done: {point}", flush=True)
        started = time.perf_counter()
        status = _child(request, run.info.run_id, folder / "log.txt")
        seconds = time.perf_counter() - started
        trial.set_user_attr("seconds", seconds)
        result = folder / "result.json"
        if status or not result.exists():
            error = _last_error(folder / "log.txt", status)
            client.set_tag(run.info.run_id, "error", error[:5000])
            client.set_terminated(run.info.run_id, "FAILED")
            trial.set_user_attr("error", error)
            self._drop(trial.number, point)
            self._study.tell(trial, state=self._states.FAIL)
            print(f"   failed: {error} (all of it in {folder / 'log.txt'})", flush=True)
            return
        measured = json.loads(result.read_text())
        trial.set_user_attr("model_id", measured["model_id"])
        self._study.tell(trial, [measured["bytes"], measured["perplexity"]])
        print(
            f"   {measured['bytes'] / 1e6:.1f} MB, perplexity "
            f"{measured['perplexity']:.2f}, {seconds:.0f} s",
            flush=True,
        )

    def _front(self) -> list[Done]:
        """The trials that no other beats in both, by bytes."""
        best = {trial.user_attrs.get("same_as", trial.number) for trial in self._study.best_trials}
        return sorted((d for d in self.done() if d.number in best), key=lambda d: d.bytes)

    def _failed(self) -> list[str]:
        """Names of the points asked for that failed and have not come to their end since."""
        finished = {done.point for done in self.done()}
        failed = {
            Point(**trial.user_attrs["point"])
            for trial in self._study.get_trials(states=(self._states.FAIL,))
            if "point" in trial.user_attrs
        }
        return sorted(str(point) for point in (failed - finished) & set(self._options.points))

    def _draw(self) -> None:
        """Table and front onto the parent run, as they are now."""
        import mlflow

        from mlflow_projects.figures import pareto

        done, front = self.done(), self._front()
        if not done:
            return
        best = {d.number for d in front}
        mlflow.log_text(_csv(done, best), "trials.csv")
        mlflow.log_figure(pareto(done, front), "pareto.png")
        mlflow.log_metrics(
            {
                "trials_finished": len(done),
                "trials_failed": len(self._failed()),
                "trials_on_front": len(front),
            }
        )

    def _prune(self) -> None:
        """Delete the checkpoints that are not to be kept, and their logged models."""
        import mlflow

        if self._options.keep == "all":
            return
        kept = {d.number for d in self._front()} if self._options.keep == "front" else set()
        for done in self.done():
            folder = self._folder(done.number, done.point)
            if done.number not in kept and (folder / CHECKPOINT).exists():
                mlflow.MlflowClient().delete_logged_model(done.model_id)
                self._drop(done.number, done.point)

    def _folder(self, number: int, point: Point) -> Path:
        return self._options.output / f"{number:03d}-{point}"

    def _drop(self, number: int, point: Point) -> None:
        """Delete the checkpoint of a trial, where it has one."""
        shutil.rmtree(self._folder(number, point) / CHECKPOINT, ignore_errors=True)


def _child(request: Path, run_id: str, log: Path) -> int:
    """The exit status of the trial's process; it ends with this one."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow_projects.sweep.trial", str(request)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"MLFLOW_RUN_ID": run_id},
        )
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise


def _last_error(log: Path, status: int) -> str:
    """The line that says why, for a table."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line.partition(":")[0] and ":" in line]
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return said[-1] if said else lines[-1] if lines else f"ended with status {status}"


def _csv(done: Sequence[Done], front: set[int]) -> str:
    text = io.StringIO()
    measured = ("bytes", "perplexity", "seconds", "run_id", "model_id")
    columns = ["trial", *done[0].point.params(), *measured, "on_front"]
    rows = csv.DictWriter(text, columns, lineterminator="\n")
    rows.writeheader()
    for d in done:
        figures = {name: getattr(d, name) for name in measured}
        rows.writerow(
            {"trial": d.number, **d.point.params(), **figures, "on_front": d.number in front}
        )
    return text.getvalue()


def _table(done: Sequence[Done], front: Sequence[Done]) -> str:
    """By bytes; a star marks what no other beats in both."""
    best = {d.number for d in front}
    lines = [f"\n{'':2}{'trial':<28}{'MB':>9}{'perplexity':>12}{'seconds':>9}"]
    for d in sorted(done, key=lambda d: d.bytes):
        star = "★ " if d.number in best else "  "
        lines.append(
            f"{star}{d.point!s:<28}{d.bytes / 1e6:>9.1f}{d.perplexity:>12.2f}{d.seconds:>9.0f}"
        )
    return "\n".join(lines)
