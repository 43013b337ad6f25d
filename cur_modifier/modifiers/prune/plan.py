"""From settings, model and data to one plan: which units, how many of them stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.utils import is_match
from loguru import logger
from torch import nn

from cur_modifier.forms.base import is_factored
from cur_modifier.linalg import damped, growth_by_count, shrunk
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.prune.budget import Costs, by_sensitivity, costs_of, evenly
from cur_modifier.modifiers.prune.settings import PruneSettings
from cur_modifier.passes.context import trial
from cur_modifier.passes.samples import collect_samples
from cur_modifier.passes.sensitivity import Sensitivity, load_or_measure
from cur_modifier.structure.layers import decoder_layers
from cur_modifier.structure.operators import as_matrix
from cur_modifier.structure.removal import Kind, Units, dense_matrices, find_units
from cur_modifier.structure.shapes import config_fields
from cur_modifier.structure.units import is_quantized
from cur_modifier.training.schedule import split

__all__ = ["Plan", "check", "make_plan", "put_counts"]

# Shrinkage of a Gram matrix towards its diagonal at one token a feature; it falls with the tokens.
SHRINKAGE = 0.5


@dataclass(frozen=True)
class Plan:
    """What a stage is going to do.

    Attributes:
        settings: of the recipe.
        layers: the layers by name, in order.
        units: of all layers, those of attention before the neurons of a layer.
        costs: what the budget counts.
        counts: units that stay, by the consumer's name; empty until they are chosen.
        growth: by the same names, what the loss is expected to grow by.
        fields: with uniform shapes, of the config, with their new values.
        sensitivity: the loss's curvature at the consumers, where it was measured.
    """

    settings: PruneSettings
    layers: Sequence[tuple[str, nn.Module]]
    units: Sequence[Units]
    costs: Costs
    counts: Mapping[str, int] = field(default_factory=dict)
    growth: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, int] = field(default_factory=dict)
    sensitivity: Sensitivity | None = field(default=None, repr=False)

    @property
    def multiples(self) -> dict[Kind, int]:
        """What the counts of a kind are multiples of."""
        return {"neurons": self.settings.multiple_of, "heads": 1}

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
    layers = decoder_layers(model)
    _check_data(settings, batches)
    _check_weights(model, [name for name, _ in layers])
    units = _wanted(settings, model, layers)
    if settings.shapes == "uniform":
        _check_uniform(model, units)
    elif "heads" in settings.units and settings.served and _is_decoder(model):
        raise ValueError(
            "shapes 'free' with heads gives every layer its own number of heads, and vLLM keeps "
            "one cache of keys and values, of one shape for all layers. Write `shapes: uniform`, "
            "or `units: [neurons]`; or `served: false` where transformers alone runs the model."
        )
    _check_multiples(settings, units)
    _check_followers(settings, model, units)
    budget = settings.budget
    plan = Plan(
        settings, layers, units, costs_of(model, units, budget.measure, budget.sequence_length)
    )
    # Whether the budget can hold shows before any data: with all units as dear.
    flat = {u.consumer: torch.linspace(1, 0, u.count + 1).double() for u in units}
    counts = _counts(plan, flat)
    if settings.shapes == "uniform" and not config_fields(model, units, _by_kind(units, counts)):
        raise ValueError(_not_in_config(model, units))
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
        fields = config_fields(model, draft.units, _by_kind(draft.units, counts))
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


def _wanted(
    settings: PruneSettings, model: Any, layers: Sequence[tuple[str, nn.Module]]
) -> list[Units]:
    with trial(model) as run:
        # Attention comes first: neurons are fitted to what it answers without its heads.
        kinds = sorted(settings.units)
        found = find_units(model, [name for name, _ in layers], kinds, run)
    for kind in settings.units:
        if not any(each.kind == kind for each in found):
            raise ValueError(_none_found(model, layers, kind))
    wanted = [
        each
        for each in found
        if _matches(model, each.consumer, settings.targets)
        and not _matches(model, each.consumer, settings.ignore)
    ]
    if not wanted:
        consumers = ", ".join(dict.fromkeys(u.consumer.rpartition(".")[2] for u in found))
        raise ValueError(
            f"targets {settings.targets} without ignore {settings.ignore} match no consumer of "
            f"{settings.units}. A target names the module that reads the units: {consumers}. "
            "Regular expressions start with 're:', e.g. 're:.*down_proj$'."
        )
    missing = {name for name, _ in layers} - {each.layer for each in found}
    if missing:
        logger.warning(
            f"{len(missing)} layers have no {' or '.join(settings.units)} that can be removed, and "
            f"stay as they are: {sorted(missing)[:4]}"
        )
    return wanted


def _none_found(model: nn.Module, layers: Sequence[tuple[str, nn.Module]], kind: Kind) -> str:
    name, layer = layers[0]
    modules = dict(layer.named_modules(prefix=name))
    factored = [n for n, m in modules.items() if is_factored(m)]
    quantized = [n for n, m in modules.items() if is_quantized(m)]
    text = f"no {kind} of {type(model).__name__} can be removed. "
    if factored:
        return text + (
            f"{factored[0]} is factored by an earlier stage: put IDPruningModifier before "
            "CURModifier, or give CURModifier other targets."
        )
    if quantized:
        return text + (
            f"{quantized[0]} is quantized: remove units first, or load the full-precision "
            "checkpoint."
        )
    tying = [
        n
        for n, m in modules.items()
        if as_matrix(m) is None and any(p.ndim == 1 for p in m.parameters(recurse=False))
    ]
    return text + (
        "It was tried, on a copy of a layer, to leave out some of them: the layer did not answer "
        f"as with zeros in their place. What may tie them together: {', '.join(tying) or 'nothing'}"
        " (a norm over all of them), positions that depend on their number, or a router. Choose "
        f"other `units` than {kind}."
    )


def _matches(model: nn.Module, name: str, patterns: Sequence[str]) -> bool:
    return bool(is_match(name, model.get_submodule(name), list(patterns)))


def _check_uniform(model: Any, units: Sequence[Units]) -> None:
    for kind in dict.fromkeys(u.kind for u in units):
        counts = {u.count for u in units if u.kind == kind}
        layers = len({u.layer for u in units if u.kind == kind})
        every = len([n for n, _ in decoder_layers(model)])
        if len(counts) > 1 or layers < every:
            raise ValueError(
                f"shapes 'uniform' with {kind} in {layers} of {every} layers ({sorted(counts)} of "
                "them): config.json has one number for all layers. Target all layers, or write "
                "`shapes: free`."
            )


def _not_in_config(model: Any, units: Sequence[Units]) -> str:
    kinds = ", ".join(dict.fromkeys(u.kind for u in units))
    return (
        f"shapes 'uniform' with units {kinds}: no fields of {type(model.config).__name__} make "
        f"{type(model).__name__} build layers with fewer of them (its head size follows from the "
        "hidden size, or it builds the MLP otherwise). Write `shapes: free`, or `units: [neurons]`."
    )


def _check_multiples(settings: PruneSettings, units: Sequence[Units]) -> None:
    for each in units:
        if each.kind == "neurons" and settings.multiple_of > each.count // 2:
            raise ValueError(
                f"{each.layer} has {each.count} neurons, and multiple_of {settings.multiple_of} "
                f"leaves no choice among their multiples. Use {max(each.count // 16, 1)} or less."
            )


def _check_weights(model: nn.Module, layers: Sequence[str]) -> None:
    for name, module in (item for n in layers for item in dense_matrices(model, n).items()):
        bad = int((~torch.isfinite(module.weight)).sum())  # type: ignore[arg-type]
        if bad:
            raise ValueError(
                f"{name}.weight contains NaN or infinity in {bad} entries. Repair the checkpoint."
            )


def _check_followers(settings: PruneSettings, model: nn.Module, units: Sequence[Units]) -> None:
    """Later stages must be able to split what consumers then read into their groups."""
    for follower in upstream.followers(settings):
        for each in units:
            step = (settings.multiple_of if each.kind == "neurons" else 1) * each.reads.shape[1]
            consumer = model.get_submodule(each.consumer)
            block = upstream.prune_block(follower)
            sizes = upstream.group_sizes(follower, each.consumer, consumer)
            if block and upstream.matches(follower, each.consumer, consumer):
                sizes.append(block)
            for size in sizes:
                if step % size:
                    what = f"multiple_of is {settings.multiple_of}"
                    if each.kind == "heads":
                        what = f"a head and its queries have {step} features"
                    raise ValueError(
                        f"{type(follower).__name__} takes {size} inputs of {each.consumer} "
                        f"together, and {what}: the inputs that are left may not divide by {size}. "
                        f"Set `multiple_of` to a multiple of {size}, or choose a group size that "
                        f"divides {step}."
                    )


def _check_data(settings: PruneSettings, batches: Any) -> None:
    if batches is None:
        raise ValueError(
            "no calibration data, but a removal is corrected by what the units do on text. Pass "
            "`dataset=` to oneshot."
        )
    if settings.refine is not None:
        samples = collect_samples(batches)
        split(len(samples), settings.refine.validation_share, settings.seed)


def _is_decoder(model: Any) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def _by_kind(units: Sequence[Units], counts: Mapping[str, int]) -> dict[Kind, int]:
    return {each.kind: counts[each.consumer] for each in units}


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
    labels = not _is_decoder(model)
    samples = [sample.inputs for sample in collect_samples(batches, labels=labels)]
    tokens = sum(s["input_ids"].numel() for s in samples[: config.samples])

    def curve(
        name: str, weight: torch.Tensor, gram: torch.Tensor, metric: torch.Tensor
    ) -> torch.Tensor:
        known = shrunk(gram, SHRINKAGE * len(gram) / tokens)
        outputs = damped(metric, config.damping)
        return growth_by_count(weight, known, outputs, units[name].reads.to(gram.device))

    return load_or_measure(
        model,
        {name: [model.get_submodule(name)] for name in units},
        draft.layers,
        samples,
        samples=config.samples,
        seed=draft.settings.seed,
        cache=Path(config.cache) if config.cache else None,
        curve=(f"removal, damping {config.damping}", curve),
    )
