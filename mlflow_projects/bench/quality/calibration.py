"""One pass of the dense model, for the methods that factor every weight by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cur_modifier.checkpoint.files import replacing
from cur_modifier.linalg import GramAccumulator
from cur_modifier.precision import half_products
from mlflow_projects.bench.quality.baselines import Inputs
from mlflow_projects.processes import peak_rss_bytes

__all__ = ["Calibration", "input_statistics", "kept_statistics", "projections"]

# The projections of a decoder layer, by the tensor that they read.
READERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass
class Calibration:
    """What a method may look at.

    Attributes:
        windows: token ids ``(count, length)``.
        kept: a file in which the statistics of the dense model's inputs, which are the same for
            every method and ratio, are left for later rows; None keeps none.
        spared_seconds, spared_peak: what the pass took that found them, and the most bytes it held,
            where this row read them.
    """

    windows: torch.Tensor
    kept: Path | None = None
    spared_seconds: float = 0.0
    spared_peak: int = 0


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The seven projections of all layers by name: what protocol P counts.

    Raises:
        ValueError: a model of another architecture.
    """
    wanted = {name for group in READERS for name in group}
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in wanted and isinstance(module, nn.Linear)
    }
    if {name.rpartition(".")[2] for name in found} != wanted:
        raise ValueError(
            f"{type(model).__name__} lacks some of the Linears {sorted(wanted)}; protocol P is "
            "defined for models that have them, such as Llama, Qwen2 and Mistral."
        )
    return found


class _Statistics:
    """Running sums of what several projections read."""

    def __init__(self, features: int) -> None:
        self.gram = GramAccumulator(features)
        self.sum_abs = torch.zeros(features, dtype=torch.float64)

    def observe(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.gram.update(args[0])
        self.sum_abs += args[0].abs().flatten(0, -2).sum(dim=0)

    def inputs(self) -> Inputs:
        return Inputs(self.gram.second_moment(), (self.sum_abs / max(self.gram.tokens, 1)).float())


@torch.no_grad()
def input_statistics(model: Any, windows: torch.Tensor) -> dict[str, Inputs]:
    """What every projection reads while the dense model sees ``windows (count, length)``.

    Projections of one input share their statistics. Memory: ``n²`` float32 for every input of
    ``n`` features, 400 MB for SmolLM2-135M.
    """
    model.eval()
    by_name: dict[str, _Statistics] = {}
    with ExitStack() as stack:
        # As our own passes: three times as fast, and the sums are as wide as before.
        stack.enter_context(half_products(model.dtype, windows.device))
        for name, linear in projections(model).items():
            layer, _, leaf = name.rpartition(".")
            for group in READERS:
                if leaf == group[0]:
                    seen = _Statistics(linear.in_features)
                    hook: Callable[..., None] = seen.observe
                    stack.callback(linear.register_forward_pre_hook(hook).remove)
                    by_name.update({f"{layer}.{reader}": seen for reader in group})
        for window in tqdm(windows, desc="Calibrating", leave=False):
            model.base_model(input_ids=window[None], use_cache=False)  # no logits are needed
    done = {seen: seen.inputs() for seen in set(by_name.values())}
    return {name: done[seen] for name, seen in by_name.items()}


def kept_statistics(model: Any, calibration: Calibration) -> dict[str, Inputs]:
    """:func:`input_statistics`, from ``calibration.kept`` where an earlier row left them there.

    What that row's pass took is added to ``calibration``.
    """
    path = calibration.kept
    if path is not None and path.exists():
        held = torch.load(path)
        calibration.spared_seconds += held["seconds"]
        calibration.spared_peak = max(calibration.spared_peak, held["peak_rss_bytes"])
        return {name: Inputs(*inputs) for name, inputs in held["statistics"].items()}
    started = time.perf_counter()
    found = input_statistics(model, calibration.windows)
    if path is not None:
        held = {
            "statistics": {name: tuple(inputs) for name, inputs in found.items()},
            "seconds": time.perf_counter() - started,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        with replacing(path) as partial:
            torch.save(held, partial)
    return found
