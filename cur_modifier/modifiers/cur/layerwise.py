"""Fit, and refine, one decoder layer after another, with the dense model beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cur_modifier.forms.base import FactoredLinear, Surroundings
from cur_modifier.linalg import anchored_target
from cur_modifier.modifiers.config import RefineConfig
from cur_modifier.modifiers.cur.fitting import Fitting, named
from cur_modifier.modifiers.cur.install import Installed, onload
from cur_modifier.modifiers.cur.plan import Plan
from cur_modifier.modifiers.refine import Part, refine_layer
from cur_modifier.passes.context import evaluation_forward, frozen
from cur_modifier.passes.samples import collect_samples
from cur_modifier.passes.streams import LayerStreams

__all__ = ["LayerwiseEngine"]


class LayerwiseEngine:
    """An :class:`~.engine.Engine` that fits all candidates when the calibration begins.

    llm-compressor's sequential pipeline shows a stage the compressed model alone.
    """

    needs_pipeline = False

    def __init__(self, installed: Sequence[Installed], fitting: Fitting) -> None:
        self._pending = list(installed)
        self._fitting = fitting
        self._plan = fitting.plan

    def start(self, model: nn.Module, batches: Any) -> None:
        onload(self._pending)
        layers = [layer for _, layer in self._plan.layers]
        last = max((each.candidate.layer for each in self._pending), default=-1)
        with evaluation_forward(model, logits=False) as device, frozen(model):
            samples = [sample.inputs for sample in collect_samples(batches)]
            streams = LayerStreams(model, layers, samples, device)
            for index in tqdm(range(last + 1), desc="Factoring layers", disable=last < 0):
                self._do_layer(streams, index)

    def layer_done(self, modules: list[nn.Module]) -> None:
        pass  # all is done by now

    def unfitted(self) -> list[str]:
        """Those that no calibration data reached."""
        return [each.candidate.name for each in self._pending]

    def _do_layer(self, streams: LayerStreams, index: int) -> None:
        """Fit the candidates of one layer in the order of execution, refine them, and go on."""
        settings = self._plan.settings
        here = {e.candidate.name: e for e in self._pending if e.candidate.layer == index}
        outputs, inputs, groups = streams.run_dense(
            {name: each.first for name, each in here.items()}, keep_inputs=bool(settings.anchor)
        )
        around: dict[str, Surroundings] = {}
        for names in groups:
            group = [here[name] for name in names]
            gram = self._fit_group(streams, group, inputs[names[0]])
            for each in group:
                self._pending.remove(each)
                if settings.refine is not None and gram is not None:
                    around |= _surroundings(each, gram, self._plan)
        if settings.refine is not None and around:
            name = self._plan.layers[index][0]
            fitted = [item for each in here.values() for item in each.containers.items()]
            refined = refine_layer(
                streams,
                outputs,
                _parts({n: c for n, c in fitted if n in around}, around, settings.refine),
                self._plan.metric(name),
                settings.refine,
                seed=settings.seed ^ index,
            )
            self._fitting.journal.refined(name, index, refined)
        streams.advance(outputs, changed=bool(here))

    def _fit_group(
        self,
        streams: LayerStreams,
        group: Sequence[Installed],
        dense_inputs: Mapping[int, torch.Tensor],
    ) -> torch.Tensor | None:
        """Fit the candidates that read one tensor to what both models put into it; the second
        moment of what the compressed model puts, where it was asked for."""
        settings, first = self._plan.settings, group[0].first
        gram = drift = None
        if settings.needs_activations or settings.anchor or settings.refine is not None:
            moments = streams.moments(first, dense_inputs, first.in_features)
            with named(group[0].candidate.name):
                gram, drift = moments.moments()
            names = [name for each in group for name in each.containers]
            gram = self._fitting.regularized(names, gram, moments.tokens)
        targets = {}
        if settings.anchor:
            assert gram is not None and drift is not None
            candidates = [each.candidate for each in group]
            drift = drift.to(gram)
            targets = {
                c.name: anchored_target(c.weight, gram, drift, settings.anchor) for c in candidates
            }
        self._fitting.fit(group, gram, targets)
        return gram


def _surroundings(each: Installed, gram: torch.Tensor, plan: Plan) -> dict[str, Surroundings]:
    """What each container of a fitted candidate reads, and what its outputs are worth."""
    candidate = each.candidate
    metric = plan.metric(candidate.name, candidate.sizes).to(gram.device)
    found, start = {}, 0
    for name, size in zip(each.containers, candidate.sizes, strict=True):
        own = slice(start, start + size)
        block = metric[own] if metric.ndim == 1 else metric[own, own]
        found[name] = Surroundings(gram, block)
        start += size
    return found


def _parts(
    containers: Mapping[str, FactoredLinear],
    around: Mapping[str, Surroundings],
    config: RefineConfig,
) -> list[Part]:
    """The factors that are trained, with the metrics on both sides of each."""
    parts = []
    for name, container in containers.items():
        metrics = container.metrics(around[name])
        for factor, linear in container.factors.items():
            if config.train == "all" or factor == container.free_factor:
                parts.append(Part(linear, *metrics[factor]))
    return parts
