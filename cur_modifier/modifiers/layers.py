"""Decoder layers: where they are, how far each turns the hidden state, which are chosen."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import nn
from tqdm import tqdm

from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.config import LayersConfig
from cur_modifier.modifiers.streams import real_rows, real_tokens
from cur_modifier.precision import half_products

__all__ = ["candidate_layers", "check_count", "choose_layers", "decoder_layers", "survey"]


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers by name, in the order of the model.

    They are the modules that llm-compressor calibrates one after another.

    Raises:
        ValueError: the model names none.
    """
    targets = infer_sequential_targets(model)
    layers = list(match_named_modules(model, [targets] if isinstance(targets, str) else targets))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} names no decoder layers (its `_no_split_modules` match "
            "nothing), so CURModifier can't tell layers apart. Only transformers models are "
            "supported."
        )
    return layers


def candidate_layers(config: LayersConfig, total: int) -> list[int]:
    """Indices of the layers that may be chosen, before any data is seen.

    Raises:
        ValueError: an index outside the model, or fewer layers than ``count``.
    """
    if isinstance(config.select, list):
        bad = [index for index in config.select if not 0 <= index < total]
        if bad or not config.select:
            raise ValueError(
                f"layers.select holds {bad or 'nothing'}; the model has layers 0 to {total - 1}."
            )
        return sorted(set(config.select))
    if config.select == "all":
        return list(range(total))
    count = config.resolved_count
    anywhere = config.select in ("last", "sensitivity")
    pool = list(range(total)) if anywhere else list(range(1, total - 1))
    if count > len(pool):
        excluded = "" if anywhere else ", first and last excluded"
        raise ValueError(
            f"layers.count is {count}, but the model has {len(pool)} layers to choose from "
            f"({total} in all{excluded}). Lower `layers.count`, or use `layers: {{select: all}}`."
        )
    return pool[-count:] if config.select == "last" else pool


def check_count(config: LayersConfig, pool: Collection[int]) -> None:
    """Raises:
    ValueError: fewer candidate layers have targets, those in ``pool``, than are to be chosen.
    """
    chooses = config.select in ("angular", "random", "sensitivity")
    if chooses and config.resolved_count > len(pool):
        raise ValueError(
            f"layers.count is {config.resolved_count}, but the targets match modules in "
            f"{len(pool)} of the layers to choose from. Lower `layers.count`."
        )


def choose_layers(
    config: LayersConfig, pool: Collection[int], seed: int, costs: Sequence[float] | None
) -> list[int]:
    """The chosen layer indices, ascending.

    Args:
        pool: candidate layers that have targets; at least as many as are to be chosen.
        costs: by layer, of which the least are taken: angular distances for ``angular``, expected
            growth of the loss for ``sensitivity``. Ties go to the deeper layer.
    """
    chosen = sorted(pool)
    if config.select == "random":
        chosen = random.Random(seed).sample(chosen, config.resolved_count)
    elif config.select in ("angular", "sensitivity"):
        assert costs is not None
        chosen.sort(key=lambda index: (costs[index], -index))
        chosen = chosen[: config.resolved_count]
    return sorted(chosen)


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
        device = stack.enter_context(upstream.evaluation_forward(model, logits=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(half_products(next(model.parameters()).dtype, device))
        for index, layer in enumerate(layers):
            handle = layer.register_forward_hook(watch_layer(index), with_kwargs=True)
            stack.callback(handle.remove)
        for name, module in watched.items():
            stack.callback(module.register_forward_pre_hook(watch_input(name)).remove)
        for batch in tqdm(batches, desc="Surveying the dense model"):
            batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            last, real = last_real_token(batch), real_tokens(batch)
            samples += last.shape[0]
            model(**batch)

    means = {name: total / tokens[name] for name, total in squares.items()}
    return [total / max(samples, 1) for total in turned], means


def angular_distance(entering: torch.Tensor, leaving: torch.Tensor) -> float:
    """Sum over samples of ``arccos(cos) / π`` between two ``(samples, hidden)`` tensors."""
    cosine = nn.functional.cosine_similarity(entering.double(), leaving.double(), dim=-1)
    return float(cosine.clamp(-1, 1).arccos().sum() / math.pi)


def last_real_token(batch: Mapping[str, Any]) -> torch.Tensor:
    """Index ``(samples,)`` of the last token that is not padding, on whichever side padding is."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    positions = torch.arange(ids.shape[-1], device=ids.device)
    return (mask.bool() * positions).argmax(dim=-1)


def _at(states: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
    assert position is not None
    return states[torch.arange(states.shape[0], device=states.device), position.to(states.device)]
