"""What the loss thinks of each module: one pass of gradients over the dense model, kept on disk.

An error ``e`` in a module's output grows the loss by about ``½ eᵀ H e``, with ``H = E[g gᵀ]`` of
the loss's gradients ``g`` at that output (the Fisher information under the Kronecker approximation
of Martens and Grosse 2015). It serves twice: as the metric of the outputs in the factorization, and
as the price list of the rank budget, through the singular values of ``H^{1/2} W G^{1/2}``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from cur_modifier.linalg import GramAccumulator, curvature_spectrum
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.streams import frozen

__all__ = ["Sensitivity", "fingerprint", "load_or_measure"]

FULL_METRIC_OUTPUTS = 4096  # above, H is kept as its diagonal: 14336² numbers a module are too many
_FORMAT = "1"


@dataclass(frozen=True)
class Sensitivity:
    """What one gradient pass found.

    Attributes:
        outputs: ``H (m, m)`` by module name, or its diagonal ``(m,)`` above 4096 outputs.
        spectra: squared singular values of ``H^{1/2} W G^{1/2}`` by module name, descending.
    """

    outputs: dict[str, torch.Tensor]
    spectra: dict[str, torch.Tensor]


def fingerprint(
    modules: Mapping[str, nn.Linear], batches: Iterable[Mapping[str, Any]], samples: int, seed: int
) -> dict[str, str]:
    """What a measurement depends on, as hashes: the weights, the data and the settings."""
    weights, data = hashlib.sha256(), hashlib.sha256()
    for name, module in modules.items():
        weights.update(f"{name}{tuple(module.weight.shape)}{module.weight.dtype}".encode())
        # Views of the bytes: numpy knows no bfloat16.
        stored = module.weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        weights.update(stored.numpy().data)
    for batch in _first(batches, samples):
        data.update(batch["input_ids"].cpu().contiguous().numpy().tobytes())
    settings = json.dumps({"samples": samples, "seed": seed, "format": _FORMAT})
    return {"model": weights.hexdigest(), "data": data.hexdigest(), "settings": settings}


def load_or_measure(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    batches: Iterable[Mapping[str, Any]],
    *,
    samples: int,
    seed: int,
    cache: Path | None,
) -> Sensitivity:
    """The sensitivities of ``modules``, from disk where they were measured before.

    Args:
        samples: how many calibration samples to run backwards.
        seed: of the labels, which are drawn from the model's own distribution: the true Fisher
            information, which asks nothing of the data's labels.
        cache: a file of the user's own. By default a file in ``$CUR_MODIFIER_CACHE`` or
            ``~/.cache/cur_modifier``, named by the fingerprint.

    Cost: forward and backward pass of ``samples`` samples, ``2 m²`` flops a token and module, and
    ``m²`` float32 numbers a module, in bfloat16 on disk.

    Raises:
        ValueError: ``cache`` holds another model's, data's or settings' measurement; gradients that
            are not finite.
    """
    wanted = fingerprint(modules, batches, samples, seed)
    path = cache or default_cache() / f"{_digest(wanted)}.safetensors"
    found = _load(path, wanted, own=cache is not None)
    if found is not None:
        logger.info(f"sensitivities read from {path}")
        return found
    measured = measure(model, modules, _first(batches, samples), seed=seed)
    _save(path, measured, wanted)
    return measured


def default_cache() -> Path:
    """Where measurements are kept that the user named no file for."""
    folder = os.environ.get("CUR_MODIFIER_CACHE")
    root = Path(folder) if folder else Path.home() / ".cache" / "cur_modifier"
    return root / "sensitivity"


def measure(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    batches: Iterable[Mapping[str, Any]],
    *,
    seed: int,
) -> Sensitivity:
    """The gradient pass. Arguments as :func:`load_or_measure`."""
    batches = list(batches)
    metrics = {name: _Metric(module.out_features) for name, module in modules.items()}
    grams: dict[str, GramAccumulator] = {}
    latest: list[tuple[torch.Tensor, GramAccumulator]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            x = args[0]
            if latest and latest[0][0] is x:
                gram = grams.setdefault(name, latest[0][1])
            else:
                gram = grams.setdefault(name, GramAccumulator(x.shape[-1], device=x.device))
                latest[:] = [(x, gram)]
                gram.update(x)
            out.register_hook(metrics[name].update)

        return hook

    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        device = stack.enter_context(upstream.training_forward(model, logits=True))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        stack.callback(embeddings.register_forward_hook(_require_gradient).remove)
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        for batch in tqdm(batches, desc="Measuring sensitivities"):
            latest.clear()
            inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
            dtype = next(model.parameters()).dtype
            half = torch.autocast(device.type, torch.bfloat16)
            with half if dtype is torch.float32 else nullcontext():
                logits = model(**inputs).logits
            _loss(logits, inputs.get("attention_mask"), generator).backward()
    outputs, spectra = {}, {}
    for name, module in modules.items():
        metric = metrics[name].result(name)
        gram = grams[name].second_moment()
        outputs[name] = metric.to(torch.bfloat16)
        weight = module.weight.detach().to(gram)
        spectra[name] = curvature_spectrum(weight, gram, metric).float()
    return Sensitivity(outputs, spectra)


class _Metric:
    """Streaming ``E[g gᵀ]``."""

    def __init__(self, outputs: int) -> None:
        self._full = outputs <= FULL_METRIC_OUTPUTS
        self._sum: torch.Tensor | None = None
        self._tokens = 0

    def update(self, gradient: torch.Tensor) -> None:
        g = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        product = g.T @ g if self._full else g.square().sum(0)
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._tokens += g.shape[0]

    def result(self, name: str) -> torch.Tensor:
        if self._sum is None:
            raise ValueError(
                f"no gradient reached {name}: the calibration never ran it. Put it on `ignore`, or "
                "calibrate with inputs that reach it."
            )
        if not bool(torch.isfinite(self._sum).all()):
            raise ValueError(
                f"the loss's gradients at {name} are not finite. Check the model's dtype (float16 "
                "overflows where bfloat16 does not)."
            )
        return self._sum / self._tokens


def _loss(
    logits: torch.Tensor, mask: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """Summed cross entropy with labels drawn from the model's own distribution."""
    flat = logits.flatten(0, -2).float()
    drawn = torch.rand(flat.shape[0], 1, generator=generator).to(flat.device)
    with torch.no_grad():
        labels = (flat.softmax(-1).cumsum(-1) < drawn).sum(-1).clamp(max=flat.shape[-1] - 1)
    losses = nn.functional.cross_entropy(flat, labels, reduction="none")
    return losses.sum() if mask is None else (losses * mask.flatten()).sum()


def _require_gradient(_: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
    return out.requires_grad_(True)


def _first(batches: Iterable[Mapping[str, Any]], samples: int) -> list[Mapping[str, Any]]:
    """The leading batches that hold ``samples`` samples, the last one whole."""
    chosen: list[Mapping[str, Any]] = []
    seen = 0
    for batch in batches:
        if seen >= samples:
            break
        chosen.append(batch)
        seen += batch["input_ids"].shape[0]
    return chosen


def _digest(wanted: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:32]


def _save(path: Path, measured: Sensitivity, wanted: Mapping[str, str]) -> None:
    tensors = {f"outputs.{k}": v.contiguous() for k, v in measured.outputs.items()}
    tensors |= {f"spectra.{k}": v.contiguous() for k, v in measured.spectra.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=dict(wanted))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        logger.warning(f"the sensitivities could not be kept in {path} ({error}); going on")


def _load(path: Path, wanted: Mapping[str, str], *, own: bool) -> Sensitivity | None:
    """What ``path`` holds, or None where there is nothing to read."""
    if not path.is_file():
        return None
    outputs: dict[str, torch.Tensor] = {}
    spectra: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            held = file.metadata() or {}
            differing = [part for part in wanted if held.get(part) != wanted[part]]
            if differing:
                raise ValueError(
                    f"{path} holds sensitivities of another {' and other '.join(differing)}. Name "
                    "another file in `sensitivity.cache`, delete this one, or leave the setting "
                    "out: files are then kept apart by themselves."
                )
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                kind, _, name = key.partition(".")
                (outputs if kind == "outputs" else spectra)[name] = file.get_tensor(key)
    except SafetensorError as error:
        if own:
            raise ValueError(
                f"{path} is no file of sensitivities ({error}). Delete it, or name another."
            ) from error
        logger.warning(f"{path} is corrupt and is measured again ({error})")
        return None
    return Sensitivity(outputs, spectra)
