"""Removing units, one layer after another, with the dense model beside it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from loguru import logger
from torch import nn
from tqdm import tqdm

from cur_modifier.linalg import (
    RemovalProblem,
    anchored_target,
    gram_norm,
    kept_features,
    shrunk,
    solve_removal,
)
from cur_modifier.modifiers.prune.journal import PruningJournal
from cur_modifier.modifiers.prune.plan import SHRINKAGE, Plan
from cur_modifier.modifiers.prune.report import UnitRecord
from cur_modifier.modifiers.refine import Part, refine_layer
from cur_modifier.passes.context import evaluation_forward, frozen
from cur_modifier.passes.samples import collect_samples
from cur_modifier.passes.streams import LayerStreams
from cur_modifier.structure.operators import as_matrix
from cur_modifier.structure.removal import Units, remove

__all__ = ["remove_units"]


def remove_units(model: nn.Module, plan: Plan, batches: Any, journal: PruningJournal) -> None:
    """Remove what the plan says, and correct the consumers, layer by layer.

    Each consumer is fitted to what it reads in the model as it is by then, anchored to what the
    dense model's answers.

    Raises:
        ValueError: no token reached a consumer, or activations that are not finite, by its name.
    """
    layers = [layer for _, layer in plan.layers]
    by_layer: dict[str, list[Units]] = {}
    for each in plan.units:
        if plan.counts[each.consumer] < each.count:
            by_layer.setdefault(each.layer, []).append(each)
    last = max((i for i, (name, _) in enumerate(plan.layers) if name in by_layer), default=-1)
    with evaluation_forward(model, logits=False) as device, frozen(model), torch.no_grad():
        samples = [sample.inputs for sample in collect_samples(batches)]
        streams = LayerStreams(model, layers, samples, device)
        for index in tqdm(range(last + 1), desc="Removing units", disable=last < 0):
            name = plan.layers[index][0]
            _Layer(model, plan, streams, journal, index).work(by_layer.get(name, []))


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

    def work(self, units: Sequence[Units]) -> None:
        """Remove units, train what is left where the recipe says so, and go on."""
        settings = self.plan.settings
        consumers = {u.consumer: self.model.get_submodule(u.consumer) for u in units}
        outputs, inputs, _ = self.streams.run_dense(consumers, keep_inputs=bool(settings.anchor))
        for each in units:
            self._remove(each, inputs[each.consumer])
        if settings.refine is not None and units:
            name = self.plan.layers[self.index][0]
            refined = refine_layer(
                self.streams,
                outputs,
                self._parts(units),
                self.plan.metric(name),
                settings.refine,
                seed=settings.seed ^ self.index,
            )
            self.journal.refined(name, self.index, refined)
        self.streams.advance(outputs, changed=bool(units))

    def _remove(self, units: Units, dense_inputs: Mapping[int, torch.Tensor]) -> None:
        started = time.perf_counter()
        settings, name = self.plan.settings, units.consumer
        consumer = self.model.get_submodule(name)
        weight, bias = as_matrix(consumer), getattr(consumer, "bias", None)
        assert weight is not None
        W = weight.detach().float()
        if bias is not None:  # the column of a feature that is always 1
            W = torch.cat([W, bias.detach().float()[:, None]], dim=1)
        moments = self.streams.moments(
            consumer, dense_inputs, weight.shape[1], constant=bias is not None
        )
        try:
            gram, drift = moments.moments()
            if moments.tokens < len(gram):
                logger.warning(
                    f"{name}: {moments.tokens} tokens calibrate {len(gram)} inputs, so their "
                    "second moment has no full rank and is shrunk towards its diagonal. Give more "
                    "samples."
                )
            known = shrunk(gram, SHRINKAGE * len(gram) / moments.tokens)
            metric = self.plan.outputs_metric(units)
            target = W.double()
            if settings.anchor:
                target = anchored_target(W, known, drift.to(known), settings.anchor)
            solved = solve_removal(
                RemovalProblem(
                    W=W,
                    gram=known,
                    units=units.reads.to(known.device),
                    count=self.plan.counts[name],
                    outputs=None if metric is None else metric.to(known.device),
                    target=target,
                    selection=settings.selection,
                    corrected=settings.corrected,
                    max_entry=settings.max_entry,
                    seed=settings.seed ^ zlib.crc32(name.encode()),
                )
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        stays = kept_features(units.reads, solved.kept, W.shape[1])
        spread = torch.zeros_like(target)
        spread[:, stays] = solved.weight
        whole = gram_norm(target, known)
        left = solved.weight if bias is None else solved.weight[:, :-1]
        corrected = None if bias is None else solved.weight[:, -1]
        remove(self.model, units, solved.kept, left, corrected)
        read = stays if bias is None else stays[:-1]
        self.streams.shrunk(consumer, self.model.get_submodule(name), read)
        self.journal.removed(
            UnitRecord(
                name=name,
                layer=self.index,
                kind=units.kind,
                before=units.count,
                after=self.plan.counts[name],
                cost=self.plan.costs.unit[name],
                relative_error=gram_norm(target - spread, known) / whole if whole else 0.0,
                expected_growth=self.plan.growth.get(name),
                max_entry=solved.max_entry,
                tokens=moments.tokens,
                seconds=time.perf_counter() - started,
            )
        )

    def _parts(self, units: Sequence[Units]) -> list[Part]:
        """What is trained of the layer, with the second moment of what it reads."""
        free = {each.consumer for each in units}
        prefix = self.plan.layers[self.index][0]
        refine = self.plan.settings.refine
        assert refine is not None
        modules = {
            name: module
            for name, module in self.streams.layer.named_modules(prefix=prefix)
            if isinstance(module, nn.Linear) or name in free
        }
        if refine.train == "free":
            modules = {name: module for name, module in modules.items() if name in free}
        grams = self.streams.grams(modules)
        return [
            Part(module, None, grams[name])
            if isinstance(module, nn.Linear)
            else Part(module, grams[name], None)
            for name, module in modules.items()
            if name in grams
        ]
