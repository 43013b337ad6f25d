"""One pass over the dense model: how far each layer turns the hidden state, how large inputs
are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cur_modifier.passes.context import evaluation_forward, on_device
from cur_modifier.passes.samples import last_real_token, real_rows, real_tokens
from cur_modifier.precision import half_products

__all__ = ["angular_distance", "survey"]


def survey(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: Sequence[nn.Module],
    watched: Mapping[str, nn.Module],
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One pass of the dense model over the calibration data, before anything is changed.

    Returns:
        The angular distance ``arccos(cos(h_in, h_out)) / π`` of every layer at the last real token,
        averaged over the samples (Men et al. 2024, as used by CURing), and for every watched
        module the mean square ``(n,)`` of its inputs.

    Cost: one forward pass, its products in half precision; memory ``n`` numbers a watched module.

    Raises:
        ValueError: a hidden state is not finite, naming the layer.
    """
    turned = [0.0] * len(layers)
    squares: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = dict.fromkeys(watched, 0)
    samples = 0
    last: torch.Tensor | None = None
    real: torch.Tensor | None = None

    def watch_layer(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            leaving = out[0] if isinstance(out, tuple) else out
            distance = angular_distance(_at(entering, last), _at(leaving, last))
            if not math.isfinite(distance):
                raise ValueError(
                    f"decoder layer {index} produces NaN or infinity on the calibration data. "
                    "Check the model's weights and dtype (float16 overflows where bfloat16 does "
                    "not)."
                )
            turned[index] += distance

        return hook

    def watch_input(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows = real_rows(args[0].detach(), real).float()
            squares[name] = squares.get(name, 0) + rows.square().sum(dim=0)
            tokens[name] += rows.shape[0]

        return hook

    with ExitStack() as stack:
        device = stack.enter_context(evaluation_forward(model, logits=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(half_products(next(model.parameters()).dtype, device))
        for index, layer in enumerate(layers):
            handle = layer.register_forward_hook(watch_layer(index), with_kwargs=True)
            stack.callback(handle.remove)
        for name, module in watched.items():
            stack.callback(module.register_forward_pre_hook(watch_input(name)).remove)
        for batch in tqdm(batches, desc="Surveying the dense model"):
            batch = on_device(batch, device)
            last, real = last_real_token(batch), real_tokens(batch)
            samples += last.shape[0]
            model(**batch)

    means = {name: total / tokens[name] for name, total in squares.items()}
    return [total / max(samples, 1) for total in turned], means


def angular_distance(entering: torch.Tensor, leaving: torch.Tensor) -> float:
    """Sum over samples of ``arccos(cos) / π`` between two ``(samples, hidden)`` tensors."""
    cosine = nn.functional.cosine_similarity(entering.double(), leaving.double(), dim=-1)
    return float(cosine.clamp(-1, 1).arccos().sum() / math.pi)


def _at(states: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
    assert position is not None
    return states[torch.arange(states.shape[0], device=states.device), position.to(states.device)]
