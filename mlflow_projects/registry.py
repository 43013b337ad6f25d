"""Checkpoints as logged models of MLflow 3: registered where they lie, found by their path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LifecycleStage

CHECKPOINT = "checkpoint"  # the tag of a logged model that holds its directory


def register(
    run_id: str,
    name: str,
    checkpoint: Path,
    params: Mapping[str, str],
    model_type: str = "causal-lm",
) -> Any:
    """The checkpoint as a logged model of the run, by reference: its bytes are not copied."""
    return mlflow.create_external_model(
        name=re.sub(r"[/:.%\"']", "-", name),  # which MLflow refuses in names
        source_run_id=run_id,
        model_type=model_type,
        tags={CHECKPOINT: str(checkpoint)},
        params=dict(params),
    )


def registered(checkpoint: str | Path) -> Any | None:
    """The newest logged model at this directory, in any experiment of the store, whose run was not
    deleted: figures go to both."""
    path = str(Path(checkpoint).resolve())
    if "'" in path:  # MLflow's filters know no way to write it
        return None
    experiments = [e.experiment_id for e in mlflow.search_experiments()]
    models = mlflow.search_logged_models(
        experiment_ids=experiments,
        filter_string=f"tags.{CHECKPOINT} = '{path}'",
        order_by=[{"field_name": "creation_timestamp", "ascending": False}],
        output_format="list",
    )
    return next((model for model in models if _run_is_active(model.source_run_id)), None)


def _run_is_active(run_id: str) -> bool:
    return mlflow.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE
