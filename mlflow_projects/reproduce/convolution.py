"""Channels of convolutions removed without retraining: Chee et al. 2022 on two small networks.

DATA holds cifar10/cifar10_train_sample1000.npz and cifar10_test_sample1000.npz. A chain of
convolutions and a residual network are trained on the first, minutes on one core; OUTPUT keeps
them. Then every method removes channels until a share of the multiply-accumulates is left, and the
accuracy on the second is measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mlflow_projects.reproduce.cases import Experiment, Row
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

__all__ = ["EXPERIMENT", "Removed", "cases"]


class Removed(NamedTuple):
    """One removal; the dense network with no share."""

    network: str
    method: str
    kept: float | None

    @property
    def labels(self) -> Row:
        """What tells its row from the others."""
        return {"network": self.network, "method": self.method, "MACs asked": self.kept or 1.0}


def cases(shares: Sequence[float] = ()) -> list[Removed]:
    """The dense networks, and each method at each share."""
    return [
        case
        for network in NETWORKS
        for case in (
            Removed(network, "dense", None),
            *(Removed(network, method, kept) for method in METHODS for kept in shares or KEPT),
        )
    ]


class _Networks:
    """A fresh copy of a trained network a case, the same images for all."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._train, self._test = read_images(options.data)
        if options.samples > len(self._train.labels):
            raise ValueError(
                f"samples {options.samples} are more than the {len(self._train.labels)} training "
                "images. Lower it."
            )

    def measure(self, case: Removed) -> Row:
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


def _table(rows: Sequence[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key != "MACs asked"} for row in rows]


EXPERIMENT = Experiment(
    "Channels of convolutions removed without retraining: does an interpolative decomposition keep "
    "the accuracy where pruning by magnitude loses it (Chee et al. 2022)? Two networks trained on "
    "1000 images of CIFAR-10, so accuracies are low; one is known to about 1.6 points from as many "
    "test images. VGG: six convolutions in a chain, with batch norms, and a Linear. ResNet: "
    "transformers' own, six basic blocks, of which only the channels inside can go.",
    lambda options: cases(options.budgets),
    lambda options, _: _Networks(options),
    figure,
    findings,
    settings=("samples", "epochs", "seed"),
    chooses=("budgets",),
    table=_table,
    metrics=lambda row: {
        f"{row['network']}/accuracy": row["accuracy"],
        "macs_kept": row["MACs kept"],
    },
)
