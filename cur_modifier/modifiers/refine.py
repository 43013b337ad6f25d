"""Training the factors of one decoder layer on its output, dense model beside compressed one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from torch import nn
from tqdm import tqdm

from cur_modifier.factored import FactoredLinear
from cur_modifier.modifiers.config import RefineConfig
from cur_modifier.modifiers.streams import LayerStreams
from cur_modifier.modifiers.training import batch_at, split, warmup_cosine

__all__ = ["Refinement", "refine_layer"]

# A held-out loss this many times that before the first step is a divergence.
DIVERGED = 4.0
_WARMUP = 0.05  # share of the steps


@dataclass
class Refinement:
    """What training one layer did.

    Attributes:
        before, after: held-out loss of the fit, and of what was kept.
        train: loss of every step.
        kept: whether the trained factors were kept.
    """

    before: float
    after: float
    train: list[float] = field(default_factory=list)
    kept: bool = True


def refine_layer(
    streams: LayerStreams,
    dense_outputs: Sequence[torch.Tensor],
    containers: Mapping[str, FactoredLinear],
    config: RefineConfig,
    *,
    seed: int,
) -> Refinement:
    """Train the factors of the layer in work so that its output is the dense model's.

    The layer reads the compressed model's hidden states, so it also mends what the layers before it
    did wrong. The loss is the mean over tokens of ``‖ŷ − y‖² / ‖y‖²``: each token counts alike,
    however massive its activations. Adam on float32 copies; the better of before and after on the
    held-out windows is kept, rounded to the model's dtype.

    Args:
        dense_outputs: ``(samples, tokens, hidden)`` by batch, of the dense model.
        containers: the layer's fitted containers by name.

    Returns:
        The losses. A layer whose training diverges, or gains nothing, keeps its fit.

    Cost: a step is a forward and backward pass of ``batch_size`` windows through one layer; memory
    that pass's activations, and four float32 copies of the factors.
    """
    layer = streams.layer
    windows = [
        (b, row) for b, batch in enumerate(streams.batches) for row in range(len(batch.dense))
    ]
    train, held_out = split(len(windows), config.validation_share, seed)
    values = _trained(layer, containers, config)
    steps = config.epochs * max(1, len(train) // config.batch_size)
    optimizer = torch.optim.AdamW(
        [value for _, _, value in values],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0,
    )

    def loss(window: int) -> torch.Tensor:
        batch, row = windows[window]
        wanted = dense_outputs[batch][row : row + 1].float()
        with streams.precision():
            out = streams.forward(streams.batches[batch].compressed[row : row + 1], batch, row)
        energy = wanted.square().sum(-1).clamp_min(1e-30)
        relative = (out.float() - wanted).square().sum(-1) / energy
        return relative[0][streams.batches[batch].real[row]].mean()

    def validate() -> float:
        with torch.no_grad():
            return math.fsum(float(loss(window)) for window in held_out) / len(held_out)

    with _answering(values):
        result = Refinement(before=validate(), after=math.nan)
        bar = tqdm(range(1, steps + 1), desc=f"Refining layer {streams.depth}", leave=False)
        for step in bar:
            rate = warmup_cosine(step, steps=steps, warmup=max(1, round(_WARMUP * steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate * config.learning_rate
            optimizer.zero_grad(set_to_none=True)
            chosen = batch_at(step, batch_size=config.batch_size, samples=len(train), seed=seed)
            total = 0.0
            for place in chosen:
                with torch.enable_grad():
                    part = loss(train[place]) / len(chosen)
                    part.backward()
                total += float(part.detach())
            result.train.append(total)
            if not math.isfinite(total):
                break
            optimizer.step()
            bar.set_postfix(loss=f"{total:.3g}")
        after = validate() if math.isfinite(result.train[-1]) else math.nan
    if not after < result.before:
        result.after, result.kept = result.before, False
        if not after <= DIVERGED * result.before:
            logger.warning(
                f"the refinement of decoder layer {streams.depth} diverged (held-out loss "
                f"{result.before:.3g}, then {after:.3g}): its closed form is kept. Lower "
                "`refine.learning_rate`."
            )
        return result
    result.after = after
    with torch.no_grad():
        for module, name, value in values:
            update_offload_parameter(module, name, value.detach().to(getattr(module, name).dtype))
    return result


_Trained = list[tuple[nn.Module, str, torch.Tensor]]
"""Modules whose parameter of that name is trained, with its float32 copy."""


def _trained(
    layer: nn.Module, containers: Mapping[str, FactoredLinear], config: RefineConfig
) -> _Trained:
    chosen: list[nn.Module] = []
    for container in containers.values():
        factors = container.factors
        names = [container.free_factor] if config.train == "free" else list(factors)
        chosen += [factors[name] for name in names if name in factors]
    if config.norms:
        chosen += [m for m in layer.modules() if _is_norm(m)]
    return [
        (module, "weight", module.weight.detach().float().clone().requires_grad_())  # type: ignore[operator]
        for module in chosen
    ]


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and weight is not None and weight.ndim == 1


@contextmanager
def _answering(values: _Trained) -> Iterator[None]:
    """The modules compute with the trained copies in place of their parameters.

    Their table of parameters is replaced for the time being, whole: upstream's table may be one
    that moves what is looked up.
    """
    tables = []
    for module, name, value in values:
        tables.append((module, vars(module)["_parameters"]))
        plain = {key: getattr(module, key) for key in vars(module)["_parameters"]}
        vars(module)["_parameters"] = plain | {name: value}
    try:
        yield
    finally:
        for module, table in tables:
            vars(module)["_parameters"] = table
