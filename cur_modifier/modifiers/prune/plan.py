"""From settings, model and data to one plan: which units, how many of them stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn

from cur_modifier.linalg import damped, growth_by_count, shrunk
from cur_modifier.modifiers.prune.budget import Costs, by_sensitivity, costs_of, evenly
from cur_modifier.modifiers.prune.checks import (
    check_data,
    check_followers,
    check_multiples,
    check_served,
    check_shapes,
    check_weights,
    fields_for,
    image_of,
    is_decoder,
    wanted_units,
)
from cur_modifier.modifiers.prune.settings import PruneSettings
from cur_modifier.passes.context import trial
from cur_modifier.passes.samples import collect_samples, main_input, stacked
from cur_modifier.passes.sensitivity import Sensitivity, load_or_measure
from cur_modifier.structure.layers import convolution_blocks, decoder_layers
from cur_modifier.structure.patches import POSITIONS, count_positions
from cur_modifier.structure.removal import Kind, Units

__all__ = ["IMAGES", "Plan", "check", "make_plan", "put_counts"]

# Shrinkage of a Gram matrix towards its diagonal at one token a feature, where units are compared;
# it falls with the tokens.
SHRINKAGE = 0.5
# Images that run through the model together.
IMAGES = 16


@dataclass(frozen=True)
class Plan:
    """What a stage is going to do.

    Attributes:
        settings: of the recipe.
        layers: the layers by name, in order.
        units: of all layers, those of attention before the neurons of a layer.
        costs: what the budget counts.
        positions: for a model of images, how often each module multiplies for one, by its name.
        counts: units that stay, by the consumer's name; empty until they are chosen.
        growth: by the same names, what the loss is expected to grow by.
        fields: with uniform shapes, of the config, with their new values.
        sensitivity: the loss's curvature at the consumers, where it was measured.
    """

    settings: PruneSettings
    layers: Sequence[tuple[str, nn.Module]]
    units: Sequence[Units]
    costs: Costs
    positions: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    growth: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, int] = field(default_factory=dict)
    sensitivity: Sensitivity | None = field(default=None, repr=False)

    @property
    def multiples(self) -> dict[Kind, int]:
        """What the counts of a kind are multiples of."""
        step = self.settings.multiple_of
        return {"neurons": step, "heads": self.settings.tensor_parallel, "channels": step}

    @property
    def corrects_layers(self) -> bool:
        """Whether all modules of a layer are fitted to what they answer in the dense model."""
        return self.settings.correct == "layers" and bool(self.settings.anchor)

    @property
    def counted(self) -> str:
        """What the budget counts."""
        return "MACs" if self.settings.budget.measure == "macs" else "parameters"

    def metric(self, name: str) -> torch.Tensor:
        """What the loss makes of errors in the outputs of a consumer or a layer."""
        assert self.sensitivity is not None
        return damped(self.sensitivity.outputs[name], self.settings.sensitivity.damping)

    def outputs_metric(self, units: Units) -> torch.Tensor | None:
        """The metric in which units are chosen, if any."""
        return self.metric(units.consumer) if self.settings.fit == "loss" else None


def check(settings: PruneSettings, model: Any, batches: Any) -> Plan:
    """The plan as far as it goes without data, and every reason that it cannot be carried out.

    Raises:
        ValueError: units that are not there or can't be removed, a budget that no selection meets,
            shapes that no reader builds, data or later stages that do not go together, each with
            the remedy.
    """
    of_images = "channels" in settings.units
    layers = convolution_blocks(model) if of_images else decoder_layers(model)
    check_data(settings, batches)
    check_weights(model, layers)
    image = image_of(batches) if of_images else None
    units = wanted_units(settings, model, layers, image)
    check_shapes(settings, model, layers, units)
    check_multiples(settings, units)
    check_followers(settings, model, units)
    budget = settings.budget
    positions = _positions(model, image) if image is not None else {}
    costs = costs_of(model, units, budget.measure, budget.sequence_length, positions)
    plan = Plan(settings, layers, units, costs, positions)
    # Whether the budget can hold shows before any data: with all units as dear.
    flat = {u.consumer: torch.linspace(1, 0, u.count + 1).double() for u in units}
    counts = _counts(plan, flat)
    if settings.shapes == "uniform":
        check_served(settings, model, fields_for(model, units, counts))
    return plan


def make_plan(draft: Plan, model: nn.Module, batches: Any) -> Plan:
    """The plan, with the counts that the data decide.

    Args:
        draft: what :func:`check` gave.

    Cost: at most one pass of gradients over a few samples, and an elimination for every layer.
    """
    settings = draft.settings
    sensitivity = _measure(draft, model, batches) if settings.needs_gradients else None
    curves: dict[str, torch.Tensor] = {}
    if sensitivity is not None:
        curves = {u.consumer: sensitivity.spectra[u.consumer].double() / 2 for u in draft.units}
    counts = _counts(draft, curves)
    growth = {name: float(curve[counts[name]]) for name, curve in curves.items()}
    fields: dict[str, int] = {}
    if settings.shapes == "uniform":
        fields = fields_for(model, draft.units, counts)
    plan = replace(draft, counts=counts, growth=growth, fields=fields, sensitivity=sensitivity)
    left = plan.costs.left(plan.units, counts) / plan.costs.total
    for kind in settings.units:
        own = [counts[u.consumer] for u in plan.units if u.kind == kind]
        if own:
            logger.info(
                f"IDPruningModifier keeps {min(own)} to {max(own)} {kind} in {len(own)} layers"
            )
    logger.info(f"budget {settings.budget.measure} {settings.budget.share}: {left:.4f} is left")
    return plan


def put_counts(model: Any, plan: Plan) -> None:
    """Let the config say how many units there are now, where it can: uniform shapes."""
    if plan.settings.shapes == "uniform":
        fields = plan.fields
        text = model.config.get_text_config()
        for name, value in fields.items():
            setattr(text, name, value)


def _positions(model: nn.Module, image: Mapping[str, torch.Tensor]) -> dict[str, int]:
    with trial(model, image) as run:
        return count_positions(model, run)


def _counts(plan: Plan, growth: Mapping[str, torch.Tensor]) -> dict[str, int]:
    budget = plan.settings.budget
    if budget.by == "uniform":
        return evenly(plan.units, plan.costs, budget, plan.multiples)
    alike = plan.settings.shapes == "uniform"
    return by_sensitivity(plan.units, plan.costs, growth, budget, plan.multiples, alike=alike)


def _measure(draft: Plan, model: nn.Module, batches: Any) -> Sensitivity:
    config = draft.settings.sensitivity
    units = {each.consumer: each for each in draft.units}
    # A language model's labels are its inputs; those of a task are what it is measured by.
    labels = not is_decoder(model)
    samples = [sample.inputs for sample in collect_samples(batches, labels=labels)]
    count = config.count([main_input(sample).numel() for sample in samples])
    chosen = samples[:count]
    if draft.positions:
        samples = stacked(chosen, IMAGES)
    # By name, the rows that a module is known from, and those that add up to one loss.
    tokens = dict.fromkeys(units, sum(main_input(s).numel() for s in chosen))
    added = dict.fromkeys(units, 1)
    if draft.positions:
        added = {name: draft.positions[name] for name in units}
        tokens = {name: len(chosen) * min(added[name], POSITIONS) for name in units}

    def curve(
        name: str, weight: torch.Tensor, gram: torch.Tensor, metric: torch.Tensor
    ) -> torch.Tensor:
        known = shrunk(gram, SHRINKAGE * len(gram) / tokens[name])
        outputs = damped(metric, config.damping)
        reads = units[name].reads.to(gram.device)
        return added[name] * growth_by_count(weight, known, outputs, reads)

    return load_or_measure(
        model,
        {name: [model.get_submodule(name)] for name in units},
        draft.layers,
        samples,
        samples=count,
        seed=draft.settings.seed,
        cache=Path(config.cache) if config.cache else None,
        curve=(f"removal, damping {config.damping}", curve),
    )
