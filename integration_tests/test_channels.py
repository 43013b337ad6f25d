"""Channels of convolutions removed by the stage: real oneshot, saved and loaded again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llmcompressor import oneshot
from support import NO_PROCESSOR, thorough
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification
from transformers.data import default_data_collator

from mlflow_projects.reproduce.networks import SmallVGG, SmallVGGConfig

QUICK: dict[str, Any] = {
    "units": ["channels"],
    "shapes": "free",
    "multiple_of": 1,
    "sensitivity": {"samples": 8},
    "mlflow": False,
}
SIDE = 16


def resnet(layer_type: str) -> Any:
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[2, 1],
        layer_type=layer_type,
        num_labels=5,
    )
    return ResNetForImageClassification(config)


NETWORKS: dict[str, Any] = {
    "basic": lambda: resnet("basic"),
    "bottleneck": lambda: resnet("bottleneck"),
    "chain": lambda: SmallVGG(SmallVGGConfig((8, 0, 12, 16, 0), image_size=SIDE, num_labels=5)),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """As loaded from a checkpoint, with batch norms that have seen something."""
    torch.manual_seed(0)
    model = NETWORKS[request.param]().train()
    with torch.no_grad():
        for _ in range(20):
            model(pixel_values=torch.randn(16, 3, SIDE, SIDE))
    model.save_pretrained(tmp_path / "dense")
    return type(model).from_pretrained(tmp_path / "dense").eval()


def images(*, labels: bool = False, count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return [
        {"pixel_values": image} | ({"labels": number % 5} if labels else {})
        for number, image in enumerate(pixels)
    ]


def pruned(model: Any, fields: dict[str, Any], data: Sequence[dict[str, Any]] | None = None) -> Any:
    stage = {"prune_modifiers": {"IDPruningModifier": QUICK | fields}}
    loader = DataLoader(data or images(), batch_size=8, collate_fn=default_data_collator)
    recipe = yaml.safe_dump({"prune_stage": stage})
    return oneshot(model=model, dataset=loader, recipe=recipe, processor=NO_PROCESSOR)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    batch = default_data_collator(images(count=4))
    return model.eval()(**batch).logits


@pytest.mark.parametrize(
    "fields",
    [
        {"budget": {"macs": 0.5}},
        *thorough(
            {"budget": {"ratio": 0.6, "by": "uniform"}, "fit": "gram", "correct": "consumers"},
            {"budget": {"parameters": 0.7}, "selection": "leverage", "correct": "none"},
        ),
    ],
)
def test_a_smaller_network_is_saved_and_loaded(
    network: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    dense = logits(network)
    before = sum(p.numel() for p in network.parameters())
    model = pruned(network, fields)
    answer = logits(model)
    assert sum(p.numel() for p in model.parameters()) < before
    assert 0 < (answer - dense).norm() < dense.norm()
    model.save_pretrained(tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["version"] == 2 and section["norms"] and not section["modules"]
    assert all("kernel_size" in s or "classifier" in n for n, s in section["resized"].items())
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), answer, rtol=1e-5, atol=1e-5)
    if isinstance(network, ResNetForImageClassification):
        batch = tmp_path / "batch.pt"
        torch.save(default_data_collator(images(count=4)), batch)
        script = (
            "import sys, torch; from transformers import AutoModelForImageClassification as M\n"
            f"model = M.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True).eval()\n"
            f"torch.save(model(**torch.load({str(batch)!r})).logits.detach(), sys.argv[1])\n"
            "assert 'cur_modifier' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "l.pt")], check=True)
        torch.testing.assert_close(torch.load(tmp_path / "l.pt"), answer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", ["basic"], indirect=True)
def test_labels_make_the_loss_the_task_s(network: Any, tmp_path: Path) -> None:
    other = type(network).from_pretrained(tmp_path / "dense").eval()
    one, two = (
        logits(pruned(model, {"budget": {"macs": 0.6}}, images(labels=labels)))
        for model, labels in ((network, False), (other, True))
    )
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shapes": "uniform"}, "shapes 'uniform' with channels.*`shapes: free`"),
        ({"multiple_of": 64}, "and multiple_of 64 leaves no choice"),
        ({"budget": {"macs": 0.01}}, r"allows \d+ of \d+ multiply-accumulates.*Raise the budget"),
    ],
)
def test_bad_input_is_refused_before_the_calibration(
    network: Any, fields: dict[str, Any], message: str, log: list[str]
) -> None:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pruned(network, {"budget": {"macs": 0.5}} | fields)
    assert not any("Measuring" in line for line in log)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_data_that_hold_no_images_are_refused(network: Any) -> None:
    with pytest.raises(ValueError, match=r"columns .*'image'.*Name the model's input so"):
        pruned(network, {}, [{"image": image["pixel_values"]} for image in images()])
