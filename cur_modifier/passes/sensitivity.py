"""What the loss thinks of each module: one pass of gradients over the dense model, kept on disk.

An error ``e`` in a module's output grows the loss by about ``½ eᵀ H e``, with ``H = E[g gᵀ]`` of
the loss's gradients ``g`` at that output (the Fisher information under the Kronecker approximation
of Martens and Grosse 2015). It serves twice: as the metric of the outputs in the factorization, and
as the price list of the rank budget, through the singular values of ``H^{1/2} W G^{1/2}``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from cur_modifier.cache import cache_folder, keep_newest
from cur_modifier.checkpoint.files import changed, digest, digest_text, replacing
from cur_modifier.linalg import GramAccumulator, curvature_spectrum
from cur_modifier.passes.context import evaluation_forward, frozen, on_device
from cur_modifier.passes.grams import SharedGrams
from cur_modifier.passes.losses import drawn_loss
from cur_modifier.passes.samples import first_batches, main_input, real_tokens
from cur_modifier.precision import half_products
from cur_modifier.structure.operators import matrix_of
from cur_modifier.structure.patches import rows_answered, rows_read
from cur_modifier.structure.readers import first_tensor

__all__ = ["Curve", "Sensitivity", "fingerprint", "load_or_measure"]

Curve = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""What a module costs at every size, from its name, its weight ``(m, n)``, ``G`` and ``H``."""

CACHE_BYTES = 20 * 10**9  # SmolLM2-135M takes 0.4, a model of 8 billion parameters about 4
FULL_METRIC_OUTPUTS = 4096  # above, H is kept as its diagonal: 14336² numbers a module are too many
_FORMAT = "2"


@dataclass(frozen=True)
class Sensitivity:
    """What one gradient pass found.

    Attributes:
        outputs: ``H (m, m)`` by name of a module or a decoder layer, or its diagonal ``(m,)`` above
            4096 outputs.
        spectra: by module name squared singular values of ``H^{1/2} W G^{1/2}``, descending; or
            what another curve gave.
    """

    outputs: dict[str, torch.Tensor]
    spectra: dict[str, torch.Tensor]


def fingerprint(
    model: nn.Module,
    modules: Mapping[str, Sequence[nn.Module]],
    batches: Iterable[Mapping[str, Any]],
    samples: int,
    seed: int,
    curve: str = "",
) -> dict[str, str]:
    """What a measurement depends on, as text: the weights, the data and the settings."""
    settings = {
        "samples": samples,
        "seed": seed,
        "format": _FORMAT,
        "modules": hashlib.sha256("\n".join(modules).encode()).hexdigest(),
    }
    if curve:
        settings["curve"] = curve
    return {
        "model": digest(model.parameters()),
        "data": digest(main_input(batch) for batch in first_batches(batches, samples)),
        "settings": json.dumps(settings),
    }


def load_or_measure(
    model: nn.Module,
    modules: Mapping[str, Sequence[nn.Module]],
    layers: Sequence[tuple[str, nn.Module]],
    batches: Iterable[Mapping[str, Any]],
    *,
    samples: int,
    seed: int,
    cache: Path | None,
    curve: tuple[str, Curve] | None = None,
) -> Sensitivity:
    """The sensitivities of ``modules`` and decoder ``layers``, from disk where they were measured
    before.

    Args:
        modules: by name, the modules that are measured as one: a single one, or several that read
            one tensor and run once a pass, whose outputs count as stacked.
        samples: how many calibration samples to run backwards.
        seed: of the labels, which are drawn from the model's own distribution: the true Fisher
            information, which asks nothing of the data's labels.
        cache: a file of the user's own. By default a file in the folder ``sensitivity`` of
            :func:`cur_modifier.cache.cache_folder`, named by the fingerprint. Of those the newest
            are kept, 20 GB together.
        curve: what is kept of each module beside its metric, with a name that tells it from others;
            the spectrum without.

    Cost: forward and backward pass of ``samples`` samples, and ``2 m² + 2 n²`` flops a token and
    module. Memory: float32 numbers, ``m²`` a module, twice at the end, and ``n²`` an input that
    modules share, of all layers at once: 2.4 GB for SmolLM2-135M, about 50 for a model of 8 billion
    parameters. On disk ``m²`` numbers of bfloat16 a module.

    Raises:
        ValueError: ``cache`` holds another model's, data's or settings' measurement; gradients that
            are not finite.
    """
    named, price = curve or ("", None)
    wanted = fingerprint(model, modules, batches, samples, seed, named)
    path = cache or cache_folder() / "sensitivity" / f"{digest_text(wanted)[:32]}.safetensors"
    found = _load(path, wanted, own=cache is not None)
    if found is not None:
        logger.info(f"sensitivities read from {path}")
        with suppress(OSError):  # used, so not the next to be deleted
            path.touch()
        return found
    chosen = first_batches(batches, samples)
    measured = measure(model, modules, layers, chosen, seed=seed, curve=price)
    if _save(path, measured, wanted) and cache is None:
        keep_newest(path.parent, CACHE_BYTES)
    return measured


def measure(
    model: nn.Module,
    modules: Mapping[str, Sequence[nn.Module]],
    layers: Sequence[tuple[str, nn.Module]],
    batches: Iterable[Mapping[str, Any]],
    *,
    seed: int,
    curve: Curve | None = None,
) -> Sensitivity:
    """The gradient pass. Arguments as :func:`load_or_measure`."""
    batches = list(batches)
    metrics = {name: _Metric() for name in [*modules, *(name for name, _ in layers)]}
    grams = SharedGrams()
    real: torch.Tensor | None = None
    number = 0

    def watch(name: str, place: int, stacked: _Stacked) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            take = stacked.hook(place)
            out.register_hook(lambda gradient: take(rows_answered(module, gradient)))
            if not place:
                for [x] in rows_read(module, args[0], seed=number):
                    grams.update(name, x, real)

        return hook

    def watch_layer(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            answer = first_tensor(out)

            def update(gradient: torch.Tensor) -> None:
                # Of images the channels come second.
                metrics[name].update(gradient.movedim(1, -1) if gradient.ndim == 4 else gradient)

            answer.register_hook(update)

        return hook

    generator = torch.Generator().manual_seed(seed)
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    with ExitStack() as stack:
        device = stack.enter_context(evaluation_forward(model, logits=True))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        of_images = any("pixel_values" in batch for batch in batches)
        if not of_images:
            embeddings = model.get_input_embeddings()  # type: ignore[operator]
            stack.callback(embeddings.register_forward_hook(_require_gradient).remove)
        for name, group in modules.items():
            stacked = _Stacked(len(group), metrics[name].update)
            for place, module in enumerate(group):
                hook = module.register_forward_hook(watch(name, place, stacked))
                stack.callback(hook.remove)
        for name, layer in layers:
            stack.callback(layer.register_forward_hook(watch_layer(name)).remove)
        for batch in tqdm(batches, desc="Measuring sensitivities"):
            number += 1
            grams.next_batch()
            inputs = on_device(batch, device)
            if of_images:
                inputs["pixel_values"] = inputs["pixel_values"].detach().requires_grad_()
            real = real_tokens(inputs)
            with half_products(next(model.parameters()).dtype, device):
                outputs = model(**inputs)
            drawn_loss(outputs, inputs, generator, problem).backward()
    found = {name: metric.result(name) for name, metric in metrics.items()}
    spectra = {}
    for name, group in modules.items():
        metric, gram = found[name], grams[name].second_moment()
        weight = torch.cat([matrix_of(module) for module in group]).to(gram)
        spectra[name] = (curve or _spectrum)(name, weight, gram, metric).float()
    return Sensitivity({name: H.to(torch.bfloat16) for name, H in found.items()}, spectra)


def _spectrum(
    name: str, weight: torch.Tensor, gram: torch.Tensor, metric: torch.Tensor
) -> torch.Tensor:
    return curvature_spectrum(weight, gram, metric)


class _Stacked:
    """Hands on the gradients at the outputs of several modules, stacked, once all have come."""

    def __init__(self, modules: int, update: Callable[[torch.Tensor], None]) -> None:
        self._modules = modules
        self._update = update
        self._found: dict[int, torch.Tensor] = {}

    def hook(self, place: int) -> Callable[[torch.Tensor], None]:
        def take(gradient: torch.Tensor) -> None:
            self._found[place] = gradient
            if len(self._found) == self._modules:
                parts = [self._found.pop(index) for index in range(self._modules)]
                self._update(parts[0] if self._modules == 1 else torch.cat(parts, dim=-1))

        return take


class _Metric:
    """Streaming ``E[g gᵀ]``, or its diagonal where that is too large."""

    def __init__(self) -> None:
        self._full: GramAccumulator | None = None
        self._diagonal: torch.Tensor | None = None
        self._tokens = 0

    def update(self, gradient: torch.Tensor) -> None:
        outputs = gradient.shape[-1]
        g = gradient.detach().reshape(-1, outputs)
        self._tokens += g.shape[0]
        if outputs <= FULL_METRIC_OUTPUTS:
            self._full = self._full or GramAccumulator(outputs, device=g.device)
            self._full.update(g)
        else:
            squares = g.float().square().sum(0)
            self._diagonal = squares if self._diagonal is None else self._diagonal + squares

    def result(self, name: str) -> torch.Tensor:
        if not self._tokens:
            raise ValueError(
                f"no gradient reached {name}: the calibration never ran it. Put it on `ignore`, or "
                "calibrate with inputs that reach it."
            )
        if self._full is not None:
            try:
                return self._full.second_moment()
            except ValueError as error:
                raise ValueError(f"{name}, gradients: {error}") from error
        assert self._diagonal is not None
        return self._diagonal / self._tokens


def _require_gradient(_: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
    return out.requires_grad_(True)


def _save(path: Path, measured: Sensitivity, wanted: Mapping[str, str]) -> bool:
    """Whether it could be written: a measurement that is not kept is used all the same."""
    tensors = {f"outputs.{k}": v.contiguous() for k, v in measured.outputs.items()}
    tensors |= {f"spectra.{k}": v.contiguous() for k, v in measured.spectra.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=dict(wanted))
    except (OSError, SafetensorError) as error:  # the latter also for a full disk
        logger.warning(f"the sensitivities could not be kept in {path} ({error}); going on")
        return False
    return True


def _load(path: Path, wanted: Mapping[str, str], *, own: bool) -> Sensitivity | None:
    """What ``path`` holds, or None where there is nothing to read."""
    if not path.is_file():
        return None
    outputs: dict[str, torch.Tensor] = {}
    spectra: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            held = file.metadata() or {}
            differing = changed({part: held.get(part, "") for part in wanted}, wanted)
            if differing:
                raise ValueError(
                    f"{path} holds sensitivities of another {' and other '.join(differing)}. Name "
                    "another file in `sensitivity.cache`, delete this one, or leave the setting "
                    "out: files are then kept apart by themselves."
                )
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                kind, _, name = key.partition(".")
                (outputs if kind == "outputs" else spectra)[name] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:  # another process may delete what is old
        if own:
            raise ValueError(
                f"{path} is no file of sensitivities ({error}). Delete it, or name another."
            ) from error
        logger.warning(f"{path} can't be read and is measured again ({error})")
        return None
    return Sensitivity(outputs, spectra)
