"""From settings, model and data to one plan: what is factored, at which rank, fitted how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn
from tqdm import tqdm

from cur_modifier.linalg import damped, energy_rank, weighted_spectrum
from cur_modifier.modifiers.cur.candidates import (
    Candidate,
    find_candidates,
    joined,
    with_direct_outputs,
)
from cur_modifier.modifiers.cur.config import Fit
from cur_modifier.modifiers.cur.followers import check_followers
from cur_modifier.modifiers.cur.ranks import expected_growth, with_budget, with_ranks
from cur_modifier.modifiers.cur.settings import CURSettings
from cur_modifier.passes.context import trial
from cur_modifier.passes.samples import collect_samples, main_input
from cur_modifier.passes.sensitivity import Sensitivity, load_or_measure
from cur_modifier.passes.survey import survey
from cur_modifier.structure.layers import decoder_layers
from cur_modifier.structure.neurons import Neurons, find_neurons
from cur_modifier.training.schedule import split

__all__ = ["Plan", "check", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What a stage is going to do.

    Attributes:
        settings: of the recipe.
        layers: the decoder layers by name, in order.
        candidates: by layer; those without a rank stay dense.
        chosen: indices of the layers that hold them.
        costs: by layer what decided: angular distances, or expected growth of the loss.
        neurons: of which candidates the outputs are to come in one order.
        sensitivity: the loss's curvature at each module, where it was measured.
    """

    settings: CURSettings
    layers: Sequence[tuple[str, nn.Module]]
    candidates: Sequence[Candidate]
    chosen: Sequence[int] = ()
    costs: Sequence[float] | None = None
    neurons: Sequence[Neurons] = ()
    sensitivity: Sensitivity | None = field(default=None, repr=False)

    def outputs_metric(self, candidate: Candidate) -> torch.Tensor | None:
        """The metric of a candidate's stacked outputs that the fit minimises in, if any."""
        by_loss = self.settings.fit is Fit.LOSS
        return self.metric(candidate.name, candidate.sizes) if by_loss else None

    def metric(self, name: str, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """What the loss makes of errors in the outputs of a candidate or a decoder layer."""
        assert self.sensitivity is not None
        return damped(self.sensitivity.outputs[name], self.settings.sensitivity.damping, sizes)


def check(settings: CURSettings, model: nn.Module, batches: Any) -> Plan:
    """The plan as far as it goes without data, and every reason that it cannot be carried out.

    Raises:
        ValueError: targets, ranks, weights, data or later stages that do not go together, each with
            the remedy.
    """
    layers = decoder_layers(model)
    allowed = settings.layers.pool(len(layers))
    candidates = find_candidates(model, layers, allowed, settings.targets, settings.ignore)
    settings.layers.check_count({candidate.layer for candidate in candidates})
    if settings.share_skeleton:
        with trial(model) as run:
            candidates = joined(model, layers, candidates, run)
        if not any(candidate.shared for candidate in candidates):
            logger.warning(
                "share_skeleton changes nothing: no two targets read one tensor. Add targets, "
                "e.g. q, k and v together."
            )
    form, unit = settings.storage, settings.rank_unit
    candidates = with_ranks(candidates, form, settings.rank, unit)
    if settings.rank.budget == "sensitivity":
        with_budget(candidates, form, settings.rank, unit, spectra=None)
    _check_data(settings, batches)
    _check_weights(candidates)
    check_followers(model, settings, candidates, form, unit)
    return Plan(settings, layers, candidates)


def make_plan(draft: Plan, model: nn.Module, batches: Any) -> Plan:
    """The plan, with what the data decide: layers, ranks, metrics, shares of a skeleton.

    Args:
        draft: what :func:`check` gave.

    Cost: at most a forward pass over all data, and one of gradients over a few samples.
    """
    settings = draft.settings
    costs, squares = _survey(draft, model, batches)
    sensitivity = None
    if settings.layers.select == "sensitivity":
        sensitivity = _measure(draft, draft.candidates, model, batches)
        costs = expected_growth(
            draft.candidates,
            settings.storage,
            settings.rank,
            settings.rank_unit,
            sensitivity.spectra,
            len(draft.layers),
        )
    pool = {c.layer for c in draft.candidates}
    chosen = settings.layers.choose(pool, settings.seed, costs)
    candidates = [c for c in draft.candidates if c.layer in chosen]
    if settings.rank.energy is not None:
        candidates = _by_energy(settings, candidates, squares)
    neurons = _neurons(draft, candidates, model)
    if sensitivity is None and settings.needs_gradients:
        sensitivity = _measure(draft, candidates, model, batches)
    if settings.rank.budget == "sensitivity":
        assert sensitivity is not None
        candidates = with_budget(
            candidates, settings.storage, settings.rank, settings.rank_unit, sensitivity.spectra
        )
    plan = replace(
        draft,
        candidates=candidates,
        chosen=chosen,
        costs=costs,
        neurons=neurons,
        sensitivity=sensitivity,
    )
    if settings.share_skeleton:
        plan = _with_shares(plan)
    modules = sum(len(c.members) for c in plan.candidates)
    logger.info(f"CURModifier factors {modules} modules in layers {chosen}")
    return plan


def _survey(
    draft: Plan, model: nn.Module, batches: Any
) -> tuple[Sequence[float] | None, Mapping[str, torch.Tensor]]:
    """Angular distances by layer, and mean squares of what the candidates read."""
    settings = draft.settings
    if not settings.needs_survey:
        return None, {}
    by_energy = settings.rank.energy is not None
    watched = {c.name: c.first for c in draft.candidates} if by_energy else {}
    return survey(model, batches, [module for _, module in draft.layers], watched)


def _by_energy(
    settings: CURSettings, candidates: Sequence[Candidate], squares: Mapping[str, torch.Tensor]
) -> list[Candidate]:
    energy = settings.rank.energy
    assert energy is not None
    needed = {
        c.name: energy_rank(weighted_spectrum(c.weight, squares.get(c.name)), energy)
        for c in candidates
    }
    return with_ranks(candidates, settings.storage, settings.rank, settings.rank_unit, needed)


def _neurons(draft: Plan, candidates: Sequence[Candidate], model: nn.Module) -> list[Neurons]:
    if not draft.settings.storage.orders_freely(draft.settings.resolved_selection):
        return []
    free = [c for c in candidates if not c.shared and c.rank is not None]
    held = [draft.layers[index][0] for index in sorted({c.layer for c in free})]
    with trial(model) as run:
        return find_neurons(model, held, {c.name for c in free}, run)


def _measure(
    draft: Plan, candidates: Sequence[Candidate], model: nn.Module, batches: Any
) -> Sensitivity:
    config = draft.settings.sensitivity
    samples = [sample.inputs for sample in collect_samples(batches)]
    return load_or_measure(
        model,
        {c.name: list(c.members.values()) for c in candidates},
        draft.layers,
        samples,
        samples=config.count([main_input(sample).numel() for sample in samples]),
        seed=draft.settings.seed,
        cache=Path(config.cache) if config.cache else None,
    )


def _with_shares(plan: Plan) -> Plan:
    """The plan with what each module gives to the skeleton that it shares."""
    unit = plan.settings.rank_unit
    shared = [
        with_direct_outputs(c, unit, plan.outputs_metric(c))
        for c in tqdm(plan.candidates, desc="Sharing skeletons")
    ]
    return replace(plan, candidates=shared)


def _check_data(settings: CURSettings, batches: Any) -> None:
    reasons = settings.data_reasons
    if reasons and batches is None:
        raise ValueError(
            f"no calibration data, but {', '.join(reasons)} need it. Pass `dataset=` to "
            "oneshot, or set `scores: weight`, `fit: weight` and `layers: {select: all}`."
        )
    if settings.refine is not None:
        samples = collect_samples(batches)
        split(len(samples), settings.refine.validation_share, settings.seed)


def _check_weights(candidates: Sequence[Candidate]) -> None:
    """Raises:
    ValueError: a weight holds NaN or infinity, naming the module.
    """
    for name, linear in (pair for c in candidates for pair in c.members.items()):
        bad = int((~torch.isfinite(linear.weight)).sum())
        if bad:
            raise ValueError(
                f"{name}.weight contains NaN or infinity in {bad} entries. Repair the "
                "checkpoint, or put the module on `ignore`."
            )
