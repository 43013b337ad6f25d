"""Channels of convolutions removed without retraining: Chee et al. 2022 on two small networks.

    mlflow run mlflow_projects/reproduce -e convolution -P data=$PWD/data -P output=$PWD/out \
        --env-manager local

DATA holds cifar10/cifar10_train_sample1000.npz and cifar10_test_sample1000.npz. A chain of
convolutions and a residual network are trained on the first, minutes on one core; OUTPUT keeps
them. Then every method removes channels until a share of the multiply-accumulates is left, and the
accuracy on the second is measured. Rows are kept in OUTPUT as they finish: a stopped experiment
continues.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")

import torch

from cur_modifier.checkpoint.files import put_text
from mlflow_projects.arguments import check_output, count, elsewhere, whole
from mlflow_projects.reproduce.__main__ import PROJECT, _cell, _log_figure, _put_section, _read
from mlflow_projects.reproduce.channels import METHODS, remove_channels
from mlflow_projects.reproduce.convolution_shown import KEPT, figure, findings
from mlflow_projects.reproduce.networks import (
    NETWORKS,
    accuracy,
    augmented,
    macs,
    read_images,
    scaled,
    trained,
)

NAME = "convolution"
SETTINGS = ("samples", "epochs", "seed")


class Case(NamedTuple):
    """One removal; the dense network with no share."""

    network: str
    method: str
    kept: float | None

    @property
    def labels(self) -> dict[str, Any]:
        """What tells this row from the others, as columns."""
        return {"network": self.network, "method": self.method, "MACs asked": self.kept or 1.0}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of the images")
    parser.add_argument("--output", required=True, type=Path, help="folder of rows and figures")
    parser.add_argument("--samples", type=count, default=256, help="calibration images")
    parser.add_argument("--epochs", type=count, default=60, help="of training")
    parser.add_argument("--seed", type=whole, default=0)
    options = parser.parse_args(arguments)
    check_output(parser, options.output, PROJECT)
    return options


def cases() -> list[Case]:
    """The dense networks, and each method at each share."""
    return [
        case
        for network in NETWORKS
        for case in (
            Case(network, "dense", None),
            *(Case(network, method, kept) for method in METHODS for kept in KEPT),
        )
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    options = parse(arguments)
    import mlflow

    try:
        harness = Harness(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{NAME}: {error}{elsewhere(options.data, PROJECT)}") from None
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{NAME}.json"
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings["data"] = str(options.data.resolve())
    kept = _read(file, settings)
    with mlflow.start_run():
        rows: list[dict[str, Any]] = []
        wanted = cases()
        for number, case in enumerate(wanted, start=1):
            found = next((row for row in kept if case.labels.items() <= row.items()), None)
            if found is None:
                label = ", ".join(f"{key} {value}" for key, value in case.labels.items())
                print(f"== {NAME} {number} of {len(wanted)}: {label}", flush=True)
                found = case.labels | harness.measure(case)
            rows.append(found)
            put_text(file, json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
        _log_figure(options.output / f"{NAME}.png", figure(rows))
        section = _section(options, rows)
        mlflow.log_text(section, f"{NAME}.md")
        mlflow.log_table({key: [row[key] for row in rows] for key in rows[0]}, "rows.json")
        for step, row in enumerate(rows):
            values = {f"{row['network']}/accuracy": row["accuracy"], "macs_kept": row["MACs kept"]}
            mlflow.log_metrics(values, step=step)
        _put_section(options.output / "RESULTS.md", NAME, section)
        print(section)


class Harness:
    """A fresh copy of a trained network a case, the same images for all."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._train, self._test = read_images(options.data)
        if options.samples > len(self._train.labels):
            raise ValueError(
                f"samples {options.samples} are more than the {len(self._train.labels)} training "
                "images. Lower it."
            )

    def measure(self, case: Case) -> dict[str, Any]:
        """Shares of multiply-accumulates and parameters, accuracy and seconds of one removal."""
        from cur_modifier.modifiers.report import parameter_count

        options, network = self._options, NETWORKS[case.network]
        folder = options.output / f"{case.network}-{options.epochs}-{options.seed}"
        model = trained(case.network, self._train, folder, options.epochs, options.seed)
        image = self._images(network.scale, 1)
        before, parameters = macs(model, image), parameter_count(model)
        started = time.perf_counter()
        if case.kept is not None:
            images = self._images(network.scale, options.samples)
            remove_channels(model, case.method, case.kept, images, seed=options.seed)
        seconds = time.perf_counter() - started
        return {
            "MACs kept": macs(model, image) / before,
            "parameters kept": parameter_count(model) / parameters,
            "accuracy": accuracy(model, self._test, network.scale),
            "seconds": round(seconds, 1),
        }

    def _images(self, scale: int, samples: int) -> Any:
        """Training images, cropped and flipped as in training: on the plain ones a network is so
        sure of itself that its loss has hardly any curvature."""
        generator = torch.Generator().manual_seed(self._options.seed)
        pixels = torch.cat([part for part, _ in augmented(self._train, generator)])
        return scaled(pixels[:samples], scale)


def _section(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [name for name in rows[0] if name != "MACs asked"]
    given = {"data": "DATA", "output": "OUT"}
    given |= {name: getattr(options, name) for name in SETTINGS}
    command = f"mlflow run mlflow_projects/reproduce -e {NAME} --env-manager local "
    return "\n".join(
        [
            f"## {NAME}",
            "",
            "Channels of convolutions removed without retraining: does an interpolative "
            "decomposition keep the accuracy where pruning by magnitude loses it (Chee et al. "
            "2022)? Two networks trained on 1000 images of CIFAR-10, so accuracies are low; one is "
            "known to about 1.6 points from as many test images. VGG: six convolutions in a chain, "
            "with batch norms, and a Linear. ResNet: transformers' own, six basic blocks, of which "
            "only the channels inside can go.",
            "",
            "| " + " | ".join(columns) + " |",
            "|" + "---|" * len(columns),
            *("| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows),
            "",
            *findings(rows),
            "",
            f"![{NAME}.png]({NAME}.png)",
            "",
            "```",
            command + " ".join(f"-P {key}={value}" for key, value in given.items()),
            "```",
            "",
        ]
    )


if __name__ == "__main__":
    main()
