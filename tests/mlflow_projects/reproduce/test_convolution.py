"""What the rows of the experiment with convolutions are taken to say."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llmcompressor")
pytest.importorskip("matplotlib")

import torch

from mlflow_projects.reproduce.channels import METHODS, OURS, PUBLISHED, _share_of_blocks
from mlflow_projects.reproduce.convolution import cases
from mlflow_projects.reproduce.convolution_shown import KEPT, figure, findings
from mlflow_projects.reproduce.networks import NETWORKS, macs


def rows(published: float, magnitude: float) -> list[dict[str, Any]]:
    """Accuracies that do not depend on the share."""
    found = []
    for case in cases():
        accuracy = {OURS: 0.5, PUBLISHED: published, "dense": 0.6}.get(case.method, magnitude)
        row = case.labels | {"MACs kept": case.kept or 1.0, "accuracy": accuracy}
        found.append(row | {"parameters kept": 1.0, "seconds": 0.0})
    return found


def test_every_method_removes_every_share_of_both_networks() -> None:
    labels = [tuple(case.labels.values()) for case in cases()]
    assert len(labels) == len(set(labels)) == len(NETWORKS) * (1 + len(METHODS) * len(KEPT))


@pytest.mark.parametrize(
    ("published", "magnitude", "holds"), [(0.59, 0.1, True), (0.5, 0.1, False), (0.6, 0.57, False)]
)
def test_the_verdict_is_of_the_rows(published: float, magnitude: float, holds: bool) -> None:
    *sentences, verdict = findings(rows(published, magnitude))
    assert ("holds on" in verdict) == holds and ("does **not** hold" in verdict) == (not holds)
    assert sentences[0].startswith("VGG: 60.0% dense; at 0.5 of the multiply-accumulates 50.0%")
    reach = f"down to {min(KEPT):g}" if published > 0.58 else "nowhere"
    assert sentences[1].startswith(
        "VGG: within 2 points of the dense accuracy stay ID (ours) nowhere"
    )
    assert f", ID, same share {reach}, " in sentences[1] and "magnitude nowhere." in sentences[1]


def test_a_panel_a_network_and_a_line_a_method() -> None:
    panels = figure(rows(0.4, 0.1)).axes
    assert [axes.get_title() for axes in panels] == list(NETWORKS)
    for axes in panels:
        assert {line.get_label() for line in axes.lines} == {"dense", "chance", *METHODS}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_keep_less_than_the_network_since_the_rest_stays(name: str) -> None:
    network = NETWORKS[name]
    model = network.build().eval()
    image = torch.randn(1, 3, 32 * network.scale, 32 * network.scale)
    share = _share_of_blocks(model, image, 0.5)
    assert share == pytest.approx(0.5) if name == "VGG" else 0 < share < 0.5
    assert macs(model, image) > macs(model, image, ("classifier",)) > 0
