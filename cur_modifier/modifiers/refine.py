"""Training the factors of one decoder layer on its output, dense model beside compressed one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from torch import nn
from tqdm import tqdm

from cur_modifier.factored import CURLinear, FactoredLinear, InterpolativeLinear
from cur_modifier.linalg import gram_sqrt
from cur_modifier.modifiers.config import RefineConfig
from cur_modifier.modifiers.streams import LayerStreams
from cur_modifier.modifiers.training import (
    DIVERGED,
    Coordinates,
    Plateau,
    batch_at,
    split,
    warmup_cosine,
)

__all__ = ["Refinement", "Surroundings", "factor_metrics", "refine_layer"]

_WARMUP = 0.05  # share of the steps


@dataclass
class Refinement:
    """What training one layer did.

    Attributes:
        before, after: held-out loss of the fit, and of what was kept.
        train: loss of every step.
        kept: whether trained factors were kept.
    """

    before: float
    after: float
    train: list[float] = field(default_factory=list)
    kept: bool = True


def refine_layer(
    streams: LayerStreams,
    dense_outputs: Sequence[torch.Tensor],
    containers: Mapping[str, FactoredLinear],
    surroundings: Mapping[str, Surroundings],
    metric: torch.Tensor,
    config: RefineConfig,
    *,
    seed: int,
) -> Refinement:
    """Train the factors of the layer in work so that its output is the dense model's.

    The layer reads the compressed model's hidden states, so it also mends what the layers before it
    did wrong. The loss is the mean over tokens of ``‖ŷ − y‖² / ‖y‖²`` in the metric that the
    model's loss gives the outputs: a massive feature that the layers behind never look at counts
    for nothing, and each token counts alike, however massive its activations. Adam trains float32
    copies in the coordinates of :class:`~.training.Coordinates`, where the loss is round; the
    best of before and after every epoch on the held-out windows is kept, rounded to the model's
    dtype.

    Args:
        dense_outputs: ``(samples, tokens, hidden)`` by batch, of the dense model.
        containers: the layer's fitted containers by name.
        surroundings: what each of them reads and answers to, by the same names.
        metric: ``H (hidden, hidden)`` of the layer's outputs, or its diagonal.

    Returns:
        The losses. A layer whose training diverges, or gains nothing, keeps its fit.

    Cost: two eigendecompositions a factor; a step is a forward and backward pass of ``batch_size``
    windows through one layer; memory that pass's activations, eight float32 copies of the
    factors, and for each the roots ``(r, r)`` and ``(m, m)`` or ``(n, n)`` of its surroundings.
    """
    layer = streams.layer
    streams.unsettle()
    windows = [
        (b, row) for b, batch in enumerate(streams.batches) for row in range(len(batch.dense))
    ]
    train, held_out = split(len(windows), config.validation_share, seed)
    trained = _trained(layer, containers, surroundings, config)
    root = gram_sqrt(metric).float().to(streams.device)
    epoch = max(1, len(train) // config.batch_size)
    steps = config.epochs * epoch
    groups = [{"params": [t.coordinates.D], "unit": t.coordinates.unit} for t in trained]
    optimizer = torch.optim.Adam(groups, lr=config.learning_rate, betas=(0.9, 0.95))

    def loss(window: int) -> torch.Tensor:
        batch, row = windows[window]
        wanted = dense_outputs[batch][row : row + 1].float()
        with streams.precision():
            out = streams.forward(streams.batches[batch].compressed[row : row + 1], batch, row)
        missed, whole = (y * root if root.ndim == 1 else y @ root for y in (out - wanted, wanted))
        relative = missed.square().sum(-1) / whole.square().sum(-1).clamp_min(1e-30)
        return relative[0][streams.batches[batch].real[row]].mean()

    def validate() -> float:
        with torch.no_grad():
            return math.fsum(float(loss(window)) for window in held_out) / len(held_out)

    with _answering(trained):
        result = Refinement(before=validate(), after=math.nan)
        plateau = Plateau(patience=config.epochs, best=result.before)
        best: list[torch.Tensor] = []
        reached = result.before
        bar = tqdm(range(1, steps + 1), desc=f"Refining layer {streams.depth}", leave=False)
        for step in bar:
            rate = warmup_cosine(step, steps=steps, warmup=max(1, round(_WARMUP * steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate * config.learning_rate * group["unit"]
            chosen = batch_at(step, batch_size=config.batch_size, samples=len(train), seed=seed)
            total = 0.0
            for place in chosen:
                with torch.enable_grad():
                    part = loss(train[place]) / len(chosen)
                    part.backward()
                total += float(part.detach())
            result.train.append(total)
            if not math.isfinite(total):
                reached = math.nan
                break
            for one in trained:
                one.coordinates.pull_gradient()
            optimizer.step()
            for one in trained:
                one.coordinates.push()
            bar.set_postfix(loss=f"{total:.3g}")
            if step % epoch == 0 or step == steps:
                reached = validate()
                if plateau.update(step, reached):
                    best = [one.coordinates.value.detach().clone() for one in trained]
                if not reached <= DIVERGED * result.before:
                    break
    if not reached <= DIVERGED * result.before:
        logger.warning(
            f"the refinement of decoder layer {streams.depth} diverged (held-out loss "
            f"{result.before:.3g}, then {reached:.3g}): its "
            f"{'best epoch' if best else 'closed form'} is kept. Lower `refine.learning_rate`."
        )
    result.after, result.kept = plateau.best, bool(best)
    for one, value in zip(trained, best, strict=bool(best)):
        weight = cast(torch.Tensor, one.module.weight)
        update_offload_parameter(one.module, "weight", value.to(weight.dtype))
    return result


class Surroundings(NamedTuple):
    """What one container reads, and what its answers are worth.

    Attributes:
        inputs: ``G (n, n)``, positive definite.
        outputs: ``H (m, m)``, positive definite, or its diagonal ``(m,)``.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor


class _Trained(NamedTuple):
    """A module whose weight is trained."""

    module: nn.Module
    coordinates: Coordinates


def _trained(
    layer: nn.Module,
    containers: Mapping[str, FactoredLinear],
    surroundings: Mapping[str, Surroundings],
    config: RefineConfig,
) -> list[_Trained]:
    chosen = []
    for name, container in containers.items():
        around = factor_metrics(container, surroundings[name])
        for factor, linear in container.factors.items():
            if config.train == "all" or factor == container.free_factor:
                output, inputs = around[factor]
                chosen.append(_Trained(linear, Coordinates(linear.weight, output, inputs)))
    if config.norms:
        # A norm's weight scales features one by one: it is trained as it is.
        for norm in filter(_is_norm, layer.modules()):
            weight = cast(torch.Tensor, norm.weight)
            alone = torch.eye(len(weight), device=weight.device)
            chosen.append(_Trained(norm, Coordinates(weight, None, alone)))
    return chosen


def factor_metrics(
    container: FactoredLinear, around: Surroundings
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
    """``(LᵀHL, E[z zᵀ])`` of every factor ``F`` by name: the container is ``L F z``.

    The first is None where it would be a large diagonal.
    """
    G, H = around.inputs.double(), around.outputs.double()
    weights = {name: f.weight.detach().double() for name, f in container.factors.items()}
    if isinstance(container, CURLinear):
        C, U, R = (weights[name] for name in ("cur_c", "cur_u", "cur_r"))
        seen = R @ G @ R.mT
        inner = C.mT @ (H[:, None] * C if H.ndim == 1 else H @ C)
        return {
            "cur_r": (U.mT @ inner @ U, G),
            "cur_u": (inner, seen),
            "cur_c": (None if H.ndim == 1 else H, U @ seen @ U.mT),
        }
    assert isinstance(container, InterpolativeLinear)
    S = (container.leader or container).id_s.weight.detach().double()
    T = weights.get("id_t")
    r, order = len(S), container.order.long()
    found: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {}
    # The metric of the entries [z; T z], of which the outputs are a choice.
    stacked = S.new_zeros(r + (0 if T is None else len(T)))
    if H.ndim == 1:
        stacked[order] = H
        inner = torch.diag(stacked[:r])
        if T is not None:
            inner = inner + T.mT @ (stacked[r:, None] * T)
            found["id_t"] = (None, S @ G @ S.mT)
    else:
        whole = torch.diag(stacked)
        whole[order[:, None], order] = H
        inner = whole[:r, :r]
        if T is not None:
            side = whole[:r, r:] @ T
            inner = inner + side + side.mT + T.mT @ whole[r:, r:] @ T
            found["id_t"] = (whole[r:, r:], S @ G @ S.mT)
    return found | {"id_s": (inner, G)}


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
