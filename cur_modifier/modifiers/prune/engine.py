"""Removing units, one layer after another, with the dense model beside it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from cur_modifier.linalg import (
    RemovalProblem,
    anchored_target,
    gram_norm,
    kept_features,
    shrunk,
    solve_removal,
)
from cur_modifier.modifiers.prune.journal import PruningJournal
from cur_modifier.modifiers.prune.plan import IMAGES, Plan
from cur_modifier.modifiers.prune.report import UnitRecord
from cur_modifier.modifiers.refine import Part, refine_layer
from cur_modifier.passes.context import evaluation_forward, frozen
from cur_modifier.passes.samples import collect_samples, stacked
from cur_modifier.passes.streams import LayerStreams
from cur_modifier.structure.operators import matrix_of
from cur_modifier.structure.removal import Units, dense_matrices, remove

__all__ = ["remove_units"]

# Shrinkage of a second moment towards its diagonal at one token a feature; it falls with the
# tokens. Chosen on held-out text, of the calibration's kind and of another: what is fitted to few
# tokens of one text costs more on both.
SHRINKAGE = 4.0


def remove_units(model: nn.Module, plan: Plan, batches: Any, journal: PruningJournal) -> None:
    """Remove what the plan says, and correct what is left, layer by layer.

    Each module is fitted to what it reads in the model as it is by then, anchored to what it
    answers in the dense model.

    Raises:
        ValueError: no token reached a consumer, or activations that are not finite, by its name.
    """
    layers = [layer for _, layer in plan.layers]
    by_layer: dict[str, list[Units]] = {}
    places = {name: index for index, (name, _) in enumerate(plan.layers)}
    for each in plan.units:
        if plan.counts[each.consumer] < each.count:
            by_layer.setdefault(each.layer, []).append(each)
            continue
        cost = plan.costs.unit[each.consumer]
        journal.records[each.consumer] = UnitRecord(
            each.consumer, places[each.layer], each.kind, each.count, each.count, cost
        )
    last = max((i for i, (name, _) in enumerate(plan.layers) if name in by_layer), default=-1)
    if plan.corrects_layers and last >= 0:  # the layers behind them are corrected, too
        last = len(layers) - 1
    whole = bool(plan.positions)  # a model of images ends with a layer of ours
    with evaluation_forward(model, logits=whole) as device, frozen(model), torch.no_grad():
        samples = [sample.inputs for sample in collect_samples(batches)]
        if whole:
            samples = stacked(samples, IMAGES)
        streams = LayerStreams(model, layers, samples, device)
        for index in tqdm(range(last + 1), desc="Removing units", disable=last < 0):
            name = plan.layers[index][0]
            _Layer(model, plan, streams, journal, index).work(by_layer.get(name, []))


class _Problem(NamedTuple):
    """What modules that read one tensor are fitted to: ``weights (m, n)`` under ``gram (n, n)``.

    Where they have a bias its column comes last, and the tensor's last feature is always 1.
    """

    gram: torch.Tensor
    weights: list[torch.Tensor]
    targets: list[torch.Tensor]
    tokens: int


class _Layer:
    """One layer in work."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        streams: LayerStreams,
        journal: PruningJournal,
        index: int,
    ) -> None:
        self.model = model
        self.plan = plan
        self.streams = streams
        self.journal = journal
        self.index = index
        self.name = plan.layers[index][0]

    def work(self, units: Sequence[Units]) -> None:
        """Remove units, correct the modules in the order of execution, train what is left where the
        recipe says so, and go on."""
        anchored, refine = bool(self.plan.settings.anchor), self.plan.settings.refine
        watched = {u.consumer: self.model.get_submodule(u.consumer) for u in units}
        if self.plan.corrects_layers and (units or self.streams.diverged):
            watched = dense_matrices(self.model, self.name)
        outputs, inputs, groups = self.streams.run_dense(watched, keep_inputs=anchored)
        reading = {each.consumer: each for each in units}
        changed = False
        for names in groups:
            own = reading.pop(names[0], None)
            if own is not None:
                self._remove(own, inputs[names[0]])
                changed = True
            elif changed or self.streams.diverged:
                self._correct(names, inputs[names[0]])
        if reading:
            raise ValueError(
                f"the calibration never ran {list(reading)[:4]}, so nothing is known of their "
                "units. Put them on `ignore`, or calibrate with inputs that reach them."
            )
        if refine is not None and (changed or self.streams.diverged):
            parts, metric = self._parts(units), self.plan.metric(self.name)
            seed = self.plan.settings.seed ^ self.index
            refined = refine_layer(self.streams, outputs, parts, metric, refine, seed=seed)
            self.journal.refined(self.name, self.index, refined)
        self.streams.advance(outputs, changed=changed or self.streams.diverged)

    def _remove(self, units: Units, dense_inputs: Mapping[int, torch.Tensor]) -> None:
        started = time.perf_counter()
        settings, name = self.plan.settings, units.consumer
        old = self.model.get_submodule(name)
        with_bias = getattr(old, "bias", None) is not None
        try:
            found = self._problem([name], dense_inputs)
            [W], [target] = found.weights, found.targets
            metric = self.plan.outputs_metric(units)
            solved = solve_removal(
                RemovalProblem(
                    W=W,
                    gram=found.gram,
                    units=units.reads.to(W.device),
                    count=self.plan.counts[name],
                    outputs=None if metric is None else metric.to(W.device),
                    target=target,
                    selection=settings.selection,
                    corrected=settings.correct != "none",
                    max_entry=settings.max_entry,
                    seed=settings.seed ^ zlib.crc32(name.encode()),
                )
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        stays = kept_features(units.reads, solved.kept, W.shape[1])
        missed = target.clone()
        missed[:, stays] -= solved.weight
        whole = gram_norm(target, found.gram)
        weight, bias = solved.weight, None
        if with_bias:
            weight, bias, stays = weight[:, :-1], weight[:, -1], stays[:-1]
        remove(self.model, units, solved.kept, weight, bias)
        self.streams.shrunk(old, self.model.get_submodule(name), stays)
        self.journal.removed(
            UnitRecord(
                name=name,
                layer=self.index,
                kind=units.kind,
                before=units.count,
                after=self.plan.counts[name],
                cost=self.plan.costs.unit[name],
                relative_error=gram_norm(missed, found.gram) / whole if whole else 0.0,
                expected_growth=self.plan.growth.get(name),
                max_entry=solved.max_entry,
                tokens=found.tokens,
                seconds=time.perf_counter() - started,
            )
        )

    def _correct(self, names: Sequence[str], dense_inputs: Mapping[int, torch.Tensor]) -> None:
        """Fit modules that lose nothing to what the dense model's answer: behind a removal they
        read something else."""
        try:
            found = self._problem(names, dense_inputs)
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from error
        if found.tokens < len(found.gram):
            return  # as of an expert: so few tokens tell little of what it reads
        for name, target in zip(names, found.targets, strict=True):
            module: Any = self.model.get_submodule(name)
            if getattr(module, "bias", None) is not None:
                update_offload_parameter(module, "bias", target[:, -1].to(module.bias.dtype))
                target = target[:, :-1]
            stored = target.mT if isinstance(module, Conv1D) else target.view_as(module.weight)
            update_offload_parameter(module, "weight", stored.to(module.weight.dtype))

    def _problem(self, names: Sequence[str], dense_inputs: Mapping[int, torch.Tensor]) -> _Problem:
        modules = [self.model.get_submodule(name) for name in names]
        biases = [getattr(module, "bias", None) for module in modules]
        constant = any(bias is not None for bias in biases)
        weights = []
        for module, bias in zip(modules, biases, strict=True):
            W = matrix_of(module).float()
            if constant:
                column = W.new_zeros(len(W)) if bias is None else bias.detach().to(W)
                W = torch.cat([W, column[:, None]], dim=1)
            weights.append(W)
        features = weights[0].shape[1] - constant
        moments = self.streams.moments(modules[0], dense_inputs, features, constant=constant)
        gram, drift = moments.moments()
        if moments.tokens < features:
            logger.warning(
                f"{names[0]}: {moments.tokens} tokens calibrate {features} inputs, so their second "
                "moment has no full rank and is shrunk towards its diagonal. Give more samples."
            )
        known = shrunk(gram, SHRINKAGE * features / moments.tokens)
        anchor = self.plan.settings.anchor or 0.0
        targets = [anchored_target(W, known, drift.to(known), anchor) for W in weights]
        return _Problem(known, weights, targets, moments.tokens)

    def _parts(self, units: Sequence[Units]) -> list[Part]:
        """What is trained of the layer, with the second moment of what it reads."""
        refine = self.plan.settings.refine
        assert refine is not None
        modules = dense_matrices(self.model, self.name)
        if refine.train == "free":
            free = {each.consumer for each in units}
            modules = {name: module for name, module in modules.items() if name in free}
        grams = self.streams.grams(modules)
        parts = []
        for name, gram in grams.items():
            sides = (gram, None) if isinstance(modules[name], Conv1D) else (None, gram)
            parts.append(Part(modules[name], *sides))
        return parts
