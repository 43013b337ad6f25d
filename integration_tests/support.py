"""What the integration tests share besides fixtures: recipes as data, runs of the projects."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
# This process's part of the cores: others run other test files (`make test JOBS=`).
CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
Compress = Callable[..., Any]


def thorough(*values: Any) -> list[Any]:
    """Parameters of a test that only ``make test-all`` runs."""
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]


def asked_for(request: pytest.FixtureRequest, argument: str) -> set[Any]:
    """The values of a parametrized argument in those tests of the file that were selected: what a
    fixture of the file has to make, and no more."""
    return {
        item.callspec.params[argument]
        for item in request.session.items
        if item.path == request.path
        and hasattr(item, "callspec")
        and argument in item.callspec.params
    }


class _Processor:
    """Stands for a tokenizer where the data are tokenized already."""


NO_PROCESSOR = _Processor()


def project_command(
    name: str, parameters: Mapping[str, object], entry_point: str = "main"
) -> list[str]:
    """`mlflow run` of one of our projects, in this environment."""
    given = [f"-P{key}={value}" for key, value in parameters.items()]
    project = str(REPOSITORY / "mlflow_projects" / name)
    chosen = ["-e", entry_point, "--env-manager", "local"]
    return [sys.executable, "-m", "mlflow", "run", project, *chosen, *given]


def project_environment(store: str) -> dict[str, str]:
    """Variables for it: the store, and this environment's `python` first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"MLFLOW_TRACKING_URI": store, "PATH": path}


def run_project(
    name: str, store: str, *, entry_point: str = "main", **parameters: object
) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        project_command(name, parameters, entry_point),
        env=project_environment(store),
        capture_output=True,
        text=True,
    )


def refusal(
    script: Any, arguments: Mapping[str, object], capsys: Any, positional: Sequence[str] = ()
) -> str:
    """What the script of a project says as it ends with an error, no run left active; on one line.

    Arguments that are None are left out.
    """
    given = [
        part
        for key, value in arguments.items()
        if value is not None
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    with pytest.raises(SystemExit) as stopped:
        script.main([*positional, *given])
    assert stopped.value.code != 0
    assert mlflow.active_run() is None
    return " ".join(f"{capsys.readouterr().err} {stopped.value.code}".split())


def recipe_text(
    cur: dict[str, Any], then: dict[str, Any] | None = None, *, first: dict[str, Any] | None = None
) -> str:
    """A recipe as YAML text; MLflow off unless asked for."""
    stage: dict[str, Any] = {"first_modifiers": first} if first else {}
    stage["cur_modifiers"] = {"CURModifier": {"mlflow": False, **cur}}
    if then:
        stage["then_modifiers"] = copy.deepcopy(then)  # or YAML writes anchors
    return yaml.safe_dump({"compress_stage": stage}, sort_keys=False)


W4A16 = {
    "GPTQModifier": {
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["re:.*(cur|id)_[a-z]$"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                },
            }
        },
    }
}
ROUND_TO_NEAREST = {"QuantizationModifier": W4A16["GPTQModifier"]}
W8A8 = {
    "QuantizationModifier": {
        "targets": ["re:.*(cur|id)_[a-z]$"],
        "ignore": ["lm_head"],
        "scheme": "W8A8",
    }
}
# Factors in 4 bits, in 8 bits with activations, and as they are; a dense Linear in 8 bits.
MIXED = {
    "QuantizationModifier": {
        "ignore": ["lm_head", "re:.*cur_u$", "re:.*layers.1.*id_s$"],
        "config_groups": {
            "four": {
                "targets": ["re:.*cur_[rcu]$"],
                "weights": W4A16["GPTQModifier"]["config_groups"]["group_0"]["weights"],
            },
            "eight": {
                "targets": ["re:.*id_[st]$", "re:.*v_proj$"],
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            },
        },
    }
}
SPARSE_2_4 = {
    "SparseGPTModifier": {
        "sparsity": 0.5,
        "mask_structure": "2:4",
        "targets": ["re:.*cur_[cur]$"],
    }
}
CUR = {"rank": {"max": 256}, "multiple_of": 32, "layers": {"select": [3, 20]}}
ID = {
    "targets": ["re:.*(q|k|v|o|gate|up|down)_proj$"],
    "form": "id",
    "rank": {"ratio": 0.8},
    "multiple_of": 32,
    "layers": {"select": [3, 20]},
}
