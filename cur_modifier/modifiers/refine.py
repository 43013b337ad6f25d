"""Training what a stage left of one layer on its output, dense model beside compressed one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from torch import nn
from tqdm import tqdm

from cur_modifier.linalg import gram_sqrt
from cur_modifier.modifiers.config import RefineConfig
from cur_modifier.modifiers.report import Refinement
from cur_modifier.passes.streams import LayerStreams
from cur_modifier.training.coordinates import Coordinates
from cur_modifier.training.schedule import DIVERGED, Plateau, batch_at, split, warmup_cosine

__all__ = ["Part", "refine_layer"]

_WARMUP = 0.05  # share of the steps


class Part(NamedTuple):
    """A module whose weight ``(p, q)`` may be trained, and what its rows and columns are worth.

    Attributes:
        left, right: metrics ``(p, p)`` and ``(q, q)``, None for the identity: of a Linear, that of
            its outputs and the second moment of its inputs.
    """

    module: nn.Module
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None


def refine_layer(
    streams: LayerStreams,
    dense_outputs: Sequence[torch.Tensor],
    parts: Sequence[Part],
    metric: torch.Tensor,
    config: RefineConfig,
    *,
    seed: int,
) -> Refinement:
    """Train parts of the layer in work so that its output is the dense model's.

    The layer reads the compressed model's hidden states, so it also mends what the layers before it
    did wrong. The loss is the mean over tokens of ``‖ŷ − y‖² / ‖y‖²`` in the metric that the
    model's loss gives the outputs: a massive feature that the layers behind never look at counts
    for nothing, and each token counts alike, however massive its activations. Adam trains float32
    copies in the coordinates of :class:`~.training.Coordinates`, where the loss is round; the
    best of before and after every epoch on the held-out windows is kept, rounded to the model's
    dtype.

    Args:
        dense_outputs: ``(samples, tokens, hidden)`` by batch, of the dense model.
        parts: of the layer; its norms come along where the config says so.
        metric: ``H (hidden, hidden)`` of the layer's outputs, or its diagonal.

    Returns:
        The losses. A layer whose training diverges, or gains nothing, keeps its fit.

    Cost: two eigendecompositions a part; a step is a forward and backward pass of ``batch_size``
    windows through one layer; memory that pass's activations, eight float32 copies of the
    parts, and for each the roots of its two metrics.
    """
    streams.unsettle()
    distance = _Distance(streams, dense_outputs, metric)
    train, held_out = split(len(distance.windows), config.validation_share, seed)
    trained = _trained(streams.layer, parts, config)
    steps = _Steps(trained, distance, train, config, seed)
    with _answering(trained):
        result = Refinement(before=distance.mean(held_out), after=math.nan)
        best, reached = _run(steps, held_out, result)
    if not reached <= DIVERGED * result.before:
        logger.warning(
            f"the refinement of decoder layer {streams.depth} diverged (held-out loss "
            f"{result.before:.3g}, then {reached:.3g}): its "
            f"{'best epoch' if best else 'closed form'} is kept. Lower `refine.learning_rate`."
        )
    result.kept = bool(best)
    for one, value in zip(trained, best, strict=bool(best)):
        weight = cast(torch.Tensor, one.module.weight)
        update_offload_parameter(one.module, "weight", value.to(weight.dtype))
    return result


def _run(
    steps: _Steps, held_out: Sequence[int], result: Refinement
) -> tuple[list[torch.Tensor], float]:
    """Train, and write down what happened.

    Returns:
        The trained values at the best epoch, none where that is before the first step, and the
        held-out loss that was reached last.
    """
    plateau = Plateau(patience=steps.config.epochs, best=result.before)
    best: list[torch.Tensor] = []
    reached = result.before
    bar = tqdm(
        range(1, steps.count + 1),
        desc=f"Refining layer {steps.distance.streams.depth}",
        leave=False,
    )
    for step in bar:
        loss = steps.take(step)
        result.train.append(loss)
        if not math.isfinite(loss):
            reached = math.nan
            break
        bar.set_postfix(loss=f"{loss:.3g}")
        if step % steps.epoch == 0 or step == steps.count:
            reached = steps.distance.mean(held_out)
            if plateau.update(step, reached):
                best = [one.coordinates.value.detach().clone() for one in steps.trained]
            if not reached <= DIVERGED * result.before:
                break
    result.after = plateau.best
    return best, reached


class _Distance:
    """The loss of one layer, window by window.

    Attributes:
        windows: ``(batch, row)`` of every one.
    """

    def __init__(
        self, streams: LayerStreams, dense_outputs: Sequence[torch.Tensor], metric: torch.Tensor
    ) -> None:
        self.streams = streams
        self._dense_outputs = dense_outputs
        self._root = gram_sqrt(metric).float().to(streams.device)
        self.windows = [
            (b, row) for b, batch in enumerate(streams.batches) for row in range(len(batch.dense))
        ]

    def of(self, window: int) -> torch.Tensor:
        """The loss of one window, with gradients."""
        streams, root = self.streams, self._root
        batch, row = self.windows[window]
        wanted = self._dense_outputs[batch][row : row + 1].float()
        with streams.precision():
            out = streams.forward(streams.batches[batch].compressed[row : row + 1], batch, row)
        missed, whole = (y * root if root.ndim == 1 else y @ root for y in (out - wanted, wanted))
        relative = missed.square().sum(-1) / whole.square().sum(-1).clamp_min(1e-30)
        return relative[0][streams.batches[batch].real[row]].mean()

    @torch.no_grad()
    def mean(self, windows: Sequence[int]) -> float:
        """The mean loss of several windows."""
        return math.fsum(float(self.of(window)) for window in windows) / len(windows)


class _Steps:
    """Adam on the coordinates of what is trained."""

    def __init__(
        self,
        trained: Sequence[_Trained],
        distance: _Distance,
        windows: Sequence[int],
        config: RefineConfig,
        seed: int,
    ) -> None:
        self.trained = trained
        self.distance = distance
        self.config = config
        self.epoch = max(1, len(windows) // config.batch_size)  # steps of one
        self.count = config.epochs * self.epoch
        self._windows = windows
        self._seed = seed
        groups = [{"params": [t.coordinates.D], "unit": t.coordinates.unit} for t in trained]
        self._optimizer = torch.optim.Adam(groups, lr=config.learning_rate, betas=(0.9, 0.95))

    def take(self, step: int) -> float:
        """Take a step; its loss. Where that is not finite nothing is changed."""
        config, warmup = self.config, max(1, round(_WARMUP * self.count))
        rate = config.learning_rate * warmup_cosine(step, steps=self.count, warmup=warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["unit"]
        chosen = batch_at(
            step, batch_size=config.batch_size, samples=len(self._windows), seed=self._seed
        )
        loss = 0.0
        for place in chosen:
            with torch.enable_grad():
                part = self.distance.of(self._windows[place]) / len(chosen)
                part.backward()
            loss += float(part.detach())
        if math.isfinite(loss):
            for one in self.trained:
                one.coordinates.pull_gradient()
            self._optimizer.step()
            for one in self.trained:
                one.coordinates.push()
        return loss


class _Trained(NamedTuple):
    """A module whose weight is trained."""

    module: nn.Module
    coordinates: Coordinates


def _trained(layer: nn.Module, parts: Sequence[Part], config: RefineConfig) -> list[_Trained]:
    chosen = []
    for module, left, right in parts:
        weight = cast(torch.Tensor, module.weight)
        chosen.append(_Trained(module, Coordinates(weight, left, right)))
    if config.norms:
        # A norm's weight scales features one by one: it is trained as it is.
        for norm in filter(_is_norm, layer.modules()):
            weight = cast(torch.Tensor, norm.weight)
            alone = torch.eye(len(weight), device=weight.device)
            chosen.append(_Trained(norm, Coordinates(weight, None, alone)))
    return chosen


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and weight is not None and weight.ndim == 1


@contextmanager
def _answering(trained: Sequence[_Trained]) -> Iterator[None]:
    """The modules compute with the trained copies in place of their weights.

    Their table of parameters is replaced for the time being, whole: upstream's table may be one
    that moves what is looked up.
    """
    tables = []
    for module, coordinates in trained:
        table = vars(module)["_parameters"]
        tables.append((module, table))
        plain = {key: getattr(module, key) for key in table}
        vars(module)["_parameters"] = plain | {"weight": coordinates.value}
    try:
        yield
    finally:
        for module, table in tables:
            vars(module)["_parameters"] = table
