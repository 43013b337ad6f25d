"""Every reason that a removal cannot be carried out, before any data is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.utils import is_match
from loguru import logger
from torch import nn

from cur_modifier.forms.base import is_factored
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.prune.settings import PruneSettings
from cur_modifier.passes.context import trial
from cur_modifier.passes.samples import collect_samples
from cur_modifier.structure.channels import staying
from cur_modifier.structure.operators import as_matrix
from cur_modifier.structure.removal import Kind, Units, dense_matrices
from cur_modifier.structure.search import find_units
from cur_modifier.structure.shapes import config_fields
from cur_modifier.structure.units import is_quantized
from cur_modifier.training.schedule import split

__all__ = [
    "check_data",
    "check_followers",
    "check_multiples",
    "check_served",
    "check_shapes",
    "check_weights",
    "fields_for",
    "image_of",
    "is_decoder",
    "wanted_units",
]


def wanted_units(
    settings: PruneSettings,
    model: Any,
    layers: Sequence[tuple[str, nn.Module]],
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> list[Units]:
    """The units that may be removed and that the targets match, those of attention first.

    Args:
        inputs: of a sample, for a model of images.

    Raises:
        ValueError: there are none of a kind, or none that match.
    """
    with trial(model, inputs) as run:
        # Attention comes first: neurons are fitted to what it answers without its heads.
        kinds = sorted(settings.units)
        found = find_units(model, [name for name, _ in layers], kinds, run)
    for kind in settings.units:
        if not any(each.kind == kind for each in found):
            raise ValueError(_none_found(model, layers, kind))
    if "channels" in settings.units:
        for name, reason in staying(model, [name for name, _ in layers], found).items():
            logger.info(f"{name} keeps its channels: {reason}")
    wanted = [
        each
        for each in found
        if _matches(model, each.consumer, settings.targets)
        and not _matches(model, each.consumer, settings.ignore)
    ]
    if not wanted:
        consumers = ", ".join(dict.fromkeys(u.consumer.rpartition(".")[2] for u in found))
        raise ValueError(
            f"targets {settings.targets} without ignore {settings.ignore} match no consumer of "
            f"{settings.units}. A target names the module that reads the units: {consumers}. "
            "Regular expressions start with 're:', e.g. 're:.*down_proj$'."
        )
    missing = {name for name, _ in layers} - {each.layer for each in found}
    if missing:
        logger.warning(
            f"{len(missing)} layers have no {' or '.join(settings.units)} that can be removed, and "
            f"stay as they are: {sorted(missing)[:4]}"
        )
    return wanted


def check_shapes(
    settings: PruneSettings,
    model: Any,
    layers: Sequence[tuple[str, nn.Module]],
    units: Sequence[Units],
) -> None:
    """Raises:
    ValueError: shapes that no reader of the checkpoint would build.
    """
    if settings.shapes == "free":
        if "heads" in settings.units and settings.served and is_decoder(model):
            raise ValueError(
                "shapes 'free' with heads gives every layer its own number of heads, and vLLM "
                "keeps one cache of keys and values, of one shape for all layers. Write `shapes: "
                "uniform`, or `units: [neurons]`; or `served: false` where transformers alone runs "
                "the model."
            )
        return
    for kind in dict.fromkeys(u.kind for u in units):
        counts = {u.count for u in units if u.kind == kind}
        holding = len({u.layer for u in units if u.kind == kind})
        if len(counts) > 1 or holding < len(layers):
            raise ValueError(
                f"shapes 'uniform' with {kind} in {holding} of {len(layers)} layers "
                f"({sorted(counts)} of them): config.json has one number for all layers. Target "
                "all layers, or write `shapes: free`."
            )


def fields_for(model: Any, units: Sequence[Units], counts: Mapping[str, int]) -> dict[str, int]:
    """Fields of the config, with their new values, for uniform counts by the consumer's name.

    Raises:
        ValueError: no fields can say them.
    """
    found = config_fields(model, units, {each.kind: counts[each.consumer] for each in units})
    if found is not None:
        return found
    kinds = ", ".join(dict.fromkeys(u.kind for u in units))
    raise ValueError(
        f"shapes 'uniform' with units {kinds}: no fields of {type(model.config).__name__} make "
        f"{type(model).__name__} build layers with fewer of them (its head size follows from the "
        "hidden size, or it builds the MLP otherwise). Write `shapes: free`, or `units: [neurons]`."
    )


def check_multiples(settings: PruneSettings, units: Sequence[Units]) -> None:
    """Raises:
    ValueError: counts that are multiples leave no choice, or ranks can't split them.
    """
    ranks = settings.tensor_parallel
    if "neurons" in settings.units and settings.multiple_of % ranks:
        raise ValueError(
            f"tensor_parallel {ranks} does not divide multiple_of {settings.multiple_of}, so ranks "
            f"could not share the neurons evenly. Set `multiple_of` to a multiple of {ranks}, e.g. "
            f"{ranks * max(settings.multiple_of // ranks, 1)}."
        )
    for each in units:
        if each.kind == "heads" and (ranks > each.count // 2 or each.count % ranks) and ranks > 1:
            raise ValueError(
                f"{each.layer} has {each.count} heads of keys and values, and tensor_parallel "
                f"{ranks} leaves no choice among counts that so many ranks share evenly. Lower "
                "`tensor_parallel`, or choose `units: [neurons]`."
            )
        if each.kind != "heads" and settings.multiple_of > each.count // 2:
            where = each.layer if each.kind == "neurons" else next(iter(each.producers))
            raise ValueError(
                f"{where} has {each.count} {each.kind}, and multiple_of {settings.multiple_of} "
                f"leaves no choice among their multiples. Use {max(each.count // 16, 1)} or less."
            )


def check_served(settings: PruneSettings, model: Any, fields: Mapping[str, int]) -> None:
    """Raises:
    ValueError: vLLM may build other shapes than transformers from the config's new fields.
    """
    text = model.config.get_text_config()
    if settings.served and is_decoder(model) and "head_dim" in fields:
        if hasattr(type(text)(), "head_dim"):
            return
        raise ValueError(
            f"shapes 'uniform' with heads: fewer heads of the same size take a head_dim in "
            f"config.json, and {type(text).__name__} declares none. transformers reads it all the "
            "same; vLLM's models of such a kind (Qwen2's) divide the hidden size by the number of "
            "heads. Choose `units: [neurons]`; or `served: false` where transformers alone runs "
            "the model."
        )


def check_weights(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> None:
    """Raises:
    ValueError: a weight holds NaN or infinity, naming the module.
    """
    for name, module in (item for n, _ in layers for item in dense_matrices(model, n).items()):
        bad = int((~torch.isfinite(module.weight)).sum())  # type: ignore[arg-type]
        if bad:
            raise ValueError(
                f"{name}.weight contains NaN or infinity in {bad} entries. Repair the checkpoint."
            )


def check_followers(settings: PruneSettings, model: nn.Module, units: Sequence[Units]) -> None:
    """Raises:
    ValueError: a later stage can't split what consumers then read into its groups or blocks.
    """
    for follower in upstream.followers(settings):
        for each in units:
            step = each.reads.shape[1]
            if each.kind != "heads":
                step *= settings.multiple_of // settings.tensor_parallel
            consumer = model.get_submodule(each.consumer)
            block = upstream.prune_block(follower)
            sizes = upstream.group_sizes(follower, each.consumer, consumer)
            if block and upstream.matches(follower, each.consumer, consumer):
                sizes.append(block)
            for size in sizes:
                if step % size:
                    what = f"multiple_of is {settings.multiple_of}"
                    if settings.tensor_parallel > 1:
                        what += f" for {settings.tensor_parallel} ranks"
                    if each.kind == "heads":
                        what = f"a head and its queries have {step} features"
                    raise ValueError(
                        f"{type(follower).__name__} takes {size} inputs of {each.consumer} "
                        f"together, and {what}: the inputs that are left may not divide by {size}. "
                        f"Set `multiple_of` to a multiple of {size * settings.tensor_parallel}, or "
                        f"choose a group size that divides {step}."
                    )


def check_data(settings: PruneSettings, batches: Any) -> None:
    """Raises:
    ValueError: there are no data, or too few to hold some out.
    """
    if not settings.needs_data:
        return
    if batches is None:
        raise ValueError(
            "no calibration data, but a removal is corrected by what the units do on data. Pass "
            "`dataset=` to oneshot; or choose by weights alone, with `fit: weight`."
        )
    if settings.refine is not None:
        samples = collect_samples(batches)
        split(len(samples), settings.refine.validation_share, settings.seed)


def image_of(batches: Any) -> dict[str, torch.Tensor]:
    """A sample by which convolutions are looked at.

    Raises:
        ValueError: there is none, or it is no image.
    """
    samples = [] if batches is None else collect_samples(batches)
    held = sorted(samples[0].inputs) if samples else []
    if "pixel_values" not in held:
        raise ValueError(
            f"channels are looked for in images, and the calibration data have the columns {held}. "
            "Give oneshot a DataLoader of batches with pixel_values, or choose other `units`."
        )
    return samples[0].inputs


def is_decoder(model: Any) -> bool:
    """Whether the model generates text, and so may be served."""
    return bool(getattr(model, "can_generate", lambda: False)())


def _none_found(model: nn.Module, layers: Sequence[tuple[str, nn.Module]], kind: Kind) -> str:
    name, layer = layers[0]
    modules = dict(layer.named_modules(prefix=name))
    factored = [n for n, m in modules.items() if is_factored(m)]
    quantized = [n for n, m in modules.items() if is_quantized(m)]
    text = f"no {kind} of {type(model).__name__} can be removed. "
    if kind == "channels":
        reasons = staying(model, [name for name, _ in layers], [])
        known = "; ".join(f"{name}: {reason}" for name, reason in [*reasons.items()][:4])
        return text + (
            f"{known or 'it has no convolution of images'}. Channels are removable between two "
            "convolutions, or a convolution and a Linear, with nothing but batch norms, "
            "activations and poolings between. Choose other `units` than channels."
        )
    if factored:
        return text + (
            f"{factored[0]} is factored by an earlier stage: put IDPruningModifier before "
            "CURModifier, or give CURModifier other targets."
        )
    if quantized:
        return text + (
            f"{quantized[0]} is quantized: remove units first, or load the full-precision "
            "checkpoint."
        )
    tying = [
        n
        for n, m in modules.items()
        if as_matrix(m) is None and any(p.ndim == 1 for p in m.parameters(recurse=False))
    ]
    return text + (
        "It was tried, on a copy of a layer, to leave out some of them: the layer did not answer "
        f"as with zeros in their place. What may tie them together: {', '.join(tying) or 'nothing'}"
        " (a norm over all of them), positions that depend on their number, or a router. Choose "
        f"other `units` than {kind}."
    )


def _matches(model: nn.Module, name: str, patterns: Sequence[str]) -> bool:
    return bool(is_match(name, model.get_submodule(name), list(patterns)))
