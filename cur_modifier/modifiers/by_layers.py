"""Fit, and refine, one decoder layer after another, with the dense model beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cur_modifier.linalg import anchored_target
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.config import RefineConfig
from cur_modifier.modifiers.distill import collect_samples
from cur_modifier.modifiers.fitting import Fitting, Waiting, named
from cur_modifier.modifiers.refine import Surroundings, refine_layer
from cur_modifier.modifiers.streams import LayerStreams, frozen

__all__ = ["run_layers"]


def run_layers(
    model: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    pending: list[Waiting],
    batches: Any,
    fitting: Fitting,
    *,
    anchor: float | None,
    refine: RefineConfig | None,
) -> None:
    """Fit all candidates.

    Args:
        layers: decoder layers by name, in order.
        pending: the candidates; each is taken off the list once it is fitted, and one that no
            calibration reaches stays.
        anchor: the dense model's share in the targets.
    """
    last = max((waiting.candidate.layer for waiting in pending), default=-1)
    with upstream.evaluation_forward(model, logits=False) as device, frozen(model):
        samples = [sample.inputs for sample in collect_samples(batches)]
        streams = LayerStreams(model, [layer for _, layer in layers], samples, device)
        for index in tqdm(range(last + 1), desc="Factoring layers", disable=last < 0):
            here = {w.candidate.name: w for w in pending if w.candidate.layer == index}
            outputs, inputs, groups = streams.run_dense(
                {n: w.first for n, w in here.items()}, keep_inputs=bool(anchor)
            )
            around: dict[str, Surroundings] = {}
            for names in groups:
                group = [here[name] for name in names]
                gram = _fit_group(
                    streams, group, inputs[names[0]], fitting, anchor, refine is not None
                )
                for waiting in group:
                    pending.remove(waiting)
                    if refine is not None and gram is not None:
                        around |= _surroundings(waiting, gram, fitting)
            if refine is not None and around:
                name = layers[index][0]
                fitted = [item for w in here.values() for item in w.containers.items()]
                refined = refine_layer(
                    streams,
                    outputs,
                    {n: c for n, c in fitted if n in around},
                    around,
                    fitting.metric(name),
                    refine,
                    seed=fitting.seed ^ index,
                )
                fitting.journal.refined(name, index, refined)
            streams.advance(outputs, changed=bool(here))


def _fit_group(
    streams: LayerStreams,
    group: Sequence[Waiting],
    dense_inputs: Mapping[int, torch.Tensor],
    fitting: Fitting,
    anchor: float | None,
    refined: bool,
) -> torch.Tensor | None:
    """Fit the candidates that read one tensor to what both models put into it; the second moment of
    what the compressed model puts, where it was asked for."""
    first = group[0].first
    gram = drift = None
    if fitting.recipe.needs_activations or anchor or refined:
        moments = streams.moments(first, dense_inputs, first.in_features)
        with named(group[0].candidate.name):
            gram, drift = moments.moments()
        names = [name for waiting in group for name in waiting.containers]
        gram = fitting.regularized(names, gram, moments.tokens)
    targets = {}
    if anchor:
        assert gram is not None and drift is not None
        candidates = [waiting.candidate for waiting in group]
        drift = drift.to(gram)
        targets = {c.name: anchored_target(c.weight, gram, drift, anchor) for c in candidates}
    fitting.fit(group, gram, targets)
    return gram


def _surroundings(
    waiting: Waiting, gram: torch.Tensor, fitting: Fitting
) -> dict[str, Surroundings]:
    """What each container of a fitted candidate reads, and what its outputs are worth."""
    candidate = waiting.candidate
    metric = fitting.metric(candidate.name, candidate.sizes).to(gram.device)
    found, start = {}, 0
    for name, size in zip(waiting.containers, candidate.sizes, strict=True):
        own = slice(start, start + size)
        block = metric[own] if metric.ndim == 1 else metric[own, own]
        found[name] = Surroundings(gram, block)
        start += size
    return found
