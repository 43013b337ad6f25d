"""Methods that remove channels of convolutions without retraining: ours, and what it is beside."""

from __future__ import annotations

from typing import Any

import torch

from mlflow_projects.reproduce.networks import macs, positions

__all__ = ["METHODS", "OURS", "PUBLISHED", "UNCORRECTED", "remove_channels"]

OURS, PUBLISHED, UNCORRECTED = "ID (ours)", "ID, same share", "ID, no correction"

# Of images there are many patches for every feature, so all of the target is the dense model's.
_STAGE: dict[str, Any] = {
    "units": ["channels"],
    "shapes": "free",
    "multiple_of": 1,
    "anchor": 1.0,
    "sensitivity": {"samples": 128},
    "mlflow": False,
}
_FREE = {"by": "sensitivity", "least": 0.0}
# The stage's settings; or the power of the norm by which filters are chosen.
METHODS: dict[str, dict[str, Any] | int] = {
    OURS: _STAGE | {"budget": _FREE},
    PUBLISHED: _STAGE
    | {"budget": {"by": "uniform"}, "fit": "gram", "correct": "consumers", "anchor": None},
    UNCORRECTED: _STAGE | {"budget": _FREE, "correct": "none", "anchor": None},
    "magnitude, L1": 1,
    "magnitude, L2": 2,
}


def remove_channels(
    model: Any, method: str, kept: float, images: torch.Tensor, *, seed: int
) -> None:
    """Remove channels until ``kept`` of the network's multiply-accumulates are left.

    Args:
        method: a name in :data:`METHODS`.
        images: to calibrate on, ``(samples, 3, side, side)``.
    """
    settings = METHODS[method]
    share = _share_of_blocks(model, images[:1], kept)
    if isinstance(settings, int):
        _by_magnitude(model, images[:1], share, settings)
    else:
        budget = settings["budget"] | {"macs": share}
        _by_stage(model, images, settings | {"budget": budget, "seed": seed})


def _share_of_blocks(model: Any, image: torch.Tensor, kept: float) -> float:
    """The share that blocks may keep for the whole network to keep ``kept``: a budget counts only
    layers that hold units."""
    from cur_modifier.structure.layers import below, convolution_blocks

    blocks = tuple(below(name) for name, _ in convolution_blocks(model))
    whole, inside = macs(model, image), macs(model, image, blocks)
    return 1 - (1 - kept) * whole / inside


def _by_stage(model: Any, images: torch.Tensor, settings: dict[str, Any]) -> None:
    import yaml
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers.data import default_data_collator

    import cur_modifier  # noqa: F401 - registers the stage

    recipe = {"prune_stage": {"prune_modifiers": {"IDPruningModifier": settings}}}
    oneshot(
        model=model,
        dataset=DataLoader(
            [{"pixel_values": image} for image in images],
            batch_size=32,
            collate_fn=default_data_collator,
        ),
        recipe=yaml.safe_dump(recipe),
        processor=object(),  # there is no tokenizer
    )


def _by_magnitude(model: Any, image: torch.Tensor, share: float, power: int) -> None:
    """Keep the filters of the largest norms, the same share in every convolution (Li et al. 2017).

    Nothing is corrected.
    """
    from cur_modifier.modifiers.prune.budget import costs_of, evenly
    from cur_modifier.modifiers.prune.config import BudgetConfig
    from cur_modifier.passes.context import trial
    from cur_modifier.structure.layers import convolution_blocks
    from cur_modifier.structure.operators import matrix_of
    from cur_modifier.structure.removal import remove
    from cur_modifier.structure.search import find_units

    layers = [name for name, _ in convolution_blocks(model)]
    with trial(model, {"pixel_values": image}) as run:
        units = find_units(model, layers, ["channels"], run)
    costs = costs_of(model, units, "macs", 1, positions(model, image))
    counts = evenly(units, costs, BudgetConfig(macs=share), {"channels": 1})
    for each in units:
        [producer] = each.producers
        norms = matrix_of(model.get_submodule(producer)).norm(p=power, dim=1)
        remove(model, each, norms.topk(counts[each.consumer]).indices.sort().values)
