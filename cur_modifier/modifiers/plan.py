"""What a stage is going to factor, and every reason it cannot, before anything slow happens."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.offload import get_offloaded_device
from compressed_tensors.utils import is_match, match_named_modules
from llmcompressor.modifiers import Modifier
from loguru import logger
from torch import nn

from cur_modifier.factored import FACTORED_CLASSES, FactoredLinear, shared_skeleton
from cur_modifier.linalg import Form, RankCurve, allocate_ranks, apportion, truncation_tail
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.config import RankConfig

__all__ = [
    "Candidate",
    "check_followers",
    "check_weights",
    "expected_growth",
    "find_candidates",
    "follower_bits",
    "with_budget",
    "with_ranks",
]


@dataclass(frozen=True)
class Candidate:
    """Linears of decoder layer ``layer`` that are factored as one: a single one that the targets
    match, or several that read one tensor and are to share a skeleton.

    Attributes:
        members: the Linears by name, in the order of execution. All are children of one module.
        rank: of their stacked weights ``(m, n)``; None where they stay dense.
        direct_outputs: where they share a skeleton, how many of its rows are outputs of each. Empty
            until they are chosen.
    """

    members: Mapping[str, nn.Linear]
    layer: int
    rank: int | None = None
    direct_outputs: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The module's name; of several, e.g. ``model.layers.3.mlp.gate_proj+up_proj``."""
        first, *others = self.members
        return "+".join([first, *(name.rpartition(".")[2] for name in others)])

    @property
    def shared(self) -> bool:
        """Whether there are several, which share a skeleton."""
        return len(self.members) > 1

    @property
    def sizes(self) -> list[int]:
        """Outputs of every member."""
        return [linear.out_features for linear in self.members.values()]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.sizes), self.first.in_features

    @property
    def bias(self) -> bool:
        """Whether any member has one. Where only some have, ranks are chosen as if all had."""
        return any(linear.bias is not None for linear in self.members.values())

    @property
    def first(self) -> nn.Linear:
        """The member that runs first."""
        return next(iter(self.members.values()))

    @property
    def weight(self) -> torch.Tensor:
        """The members' weights stacked, ``(m, n)``."""
        if not self.shared:
            return self.first.weight.detach()
        return torch.cat([linear.weight.detach() for linear in self.members.values()])

    @property
    def blocks(self) -> list[tuple[int, int]] | None:
        """Outputs and direct outputs of every member, where they share a skeleton."""
        return list(zip(self.sizes, self.direct_outputs, strict=True)) if self.shared else None

    def skeletons(
        self, form: Form, *, device: torch.device | str | None = None
    ) -> dict[str, FactoredLinear]:
        """The factored modules that will take the members' places, with empty factors.

        Where direct outputs are not chosen yet they are in proportion to the outputs.
        """
        assert self.rank is not None
        m, n = self.shape
        weight = self.first.weight
        if device is None:  # not where the weight is brought to be computed with
            offloaded = get_offloaded_device(self.first)
            device = "cpu" if offloaded == "disk" else offloaded
        like: Any = {"device": device, "dtype": weight.dtype}
        if not self.shared:
            [name] = self.members
            return {name: FACTORED_CLASSES[form](n, m, self.rank, bias=self.bias, **like)}
        layers = shared_skeleton(
            n,
            self.sizes,
            self.rank,
            self.direct_outputs or apportion(self.sizes, self.sizes, self.rank),
            bias=[linear.bias is not None for linear in self.members.values()],
            **like,
        )
        return dict(zip(self.members, layers, strict=True))


def find_candidates(
    model: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    allowed: Iterable[int],
    targets: Sequence[str],
    ignore: Sequence[str],
) -> list[Candidate]:
    """The Linears inside the allowed decoder layers that the targets match.

    Raises:
        ValueError: a target that matches no Linear inside a decoder layer; a module that an earlier
            stage factored or quantized.
    """
    prefixes = {f"{name}.": index for index, (name, _) in enumerate(layers)}
    allowed = set(allowed)
    candidates: dict[str, Candidate] = {}
    for target in targets:
        hits = 0
        for name, module in match_named_modules(model, [target]):
            layer = next((i for p, i in prefixes.items() if name.startswith(p)), None)
            _refuse_factored(model, name, module)
            if layer is None or not isinstance(module, nn.Linear):
                continue
            hits += 1
            if layer in allowed and not _ignored(name, module, ignore):
                _refuse_quantized(name, module)
                candidates[name] = Candidate(members={name: module}, layer=layer)
        if not hits:
            raise ValueError(
                f"target {target!r} matches no Linear inside the decoder layers of "
                f"{type(model).__name__}. Linears there: {_projections(layers)}. "
                "Regular expressions start with 're:', e.g. 're:.*q_proj$'."
            )
    if not candidates:
        raise ValueError(
            f"nothing is left to factor: targets {list(targets)} in layers {sorted(allowed)} are "
            f"all on ignore {list(ignore)}."
        )
    return sorted(candidates.values(), key=lambda c: c.layer)


def with_ranks(
    candidates: Sequence[Candidate],
    form: Form,
    rank: RankConfig,
    multiple_of: int,
    energies: dict[str, int] | None = None,
) -> list[Candidate]:
    """The candidates with their ranks; those that stay dense keep ``rank=None``.

    Raises:
        ValueError: no rank meets the wish for a module, naming it.
    """
    planned = []
    for candidate in candidates:
        m, n = candidate.shape
        needed = energies.get(candidate.name) if energies is not None else None
        try:
            chosen = rank.choose(
                form, m, n, bias=candidate.bias, multiple_of=multiple_of, needed=needed
            )
        except ValueError as error:
            raise ValueError(f"{candidate.name}: {error}") from None
        planned.append(replace(candidate, rank=chosen))
    return planned


def expected_growth(
    candidates: Sequence[Candidate],
    form: Form,
    rank: RankConfig,
    multiple_of: int,
    spectra: Mapping[str, torch.Tensor],
    layers: int,
) -> list[float]:
    """By layer, the growth of the loss in nats a token that its factors are expected to cost.

    Half of what the best approximation of each module's rank leaves of its spectrum: second order,
    every module by itself. Infinite for a layer without candidates.

    Args:
        rank: a rule that needs no data. Where it is a budget, its ratio counts for every module.
        spectra: squared singular values of every weight in the metric of the loss.
    """
    uniform = rank.model_copy(update={"budget": "uniform"})
    growth: dict[int, float] = {}
    for candidate in with_ranks(candidates, form, uniform, multiple_of):
        assert candidate.rank is not None
        tail = truncation_tail(spectra[candidate.name])
        lost = float(tail[candidate.rank]) / 2
        growth[candidate.layer] = growth.get(candidate.layer, 0.0) + lost
    return [growth.get(layer, math.inf) for layer in range(layers)]


def with_budget(
    candidates: Sequence[Candidate],
    form: Form,
    rank: RankConfig,
    multiple_of: int,
    spectra: Mapping[str, torch.Tensor] | None,
) -> list[Candidate]:
    """The candidates with ranks that spend ``rank.ratio`` over all of them where the loss grows
    least.

    Args:
        spectra: squared singular values of every weight in the metric of the loss. None takes all
            as equal: enough to see whether the budget can hold.

    Raises:
        ValueError: the ratio is too small for the least ranks.
    """
    assert rank.ratio is not None

    def spectrum(candidate: Candidate) -> torch.Tensor:
        return torch.ones(min(candidate.shape)) if spectra is None else spectra[candidate.name]

    curves = [
        RankCurve(form, *c.shape, loss=truncation_tail(spectrum(c)), bias=c.bias)
        for c in candidates
    ]
    ranks = allocate_ranks(curves, rank.ratio, multiple_of=multiple_of, least=rank.least)
    return [replace(c, rank=chosen) for c, chosen in zip(candidates, ranks, strict=True)]


def check_weights(candidates: Sequence[Candidate]) -> None:
    """Raises:
    ValueError: a weight holds NaN or infinity, naming the module.
    """
    for name, linear in (pair for c in candidates for pair in c.members.items()):
        bad = int((~torch.isfinite(linear.weight)).sum())
        if bad:
            raise ValueError(
                f"{name}.weight contains NaN or infinity in {bad} entries. Repair the "
                "checkpoint, or put the module on `ignore`."
            )


def check_followers(
    model: nn.Module,
    modifier: Modifier,
    planned: Sequence[Candidate],
    form: Form,
    multiple_of: int,
) -> None:
    """Check that later stages can compress the factors, and say where they would miss them.

    Raises:
        ValueError: a group size or a sparsity block that does not divide the inputs of a factor or
            of a dense Linear, naming all of them.
    """
    skeletons: dict[str, FactoredLinear] = {}
    for candidate in planned:
        if candidate.rank is not None:
            skeletons |= candidate.skeletons(form, device="meta")
    dense = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in skeletons
    }
    for follower in upstream.followers(modifier):
        if not upstream.compresses(follower):
            continue
        stage = type(follower).__name__
        problems: list[str] = []
        missed: defaultdict[str, list[str]] = defaultdict(list)
        for name, skeleton in skeletons.items():
            whole = upstream.matches(follower, name, nn.Linear(1, 1, device="meta"))
            for child, factor in skeleton.factors.items():
                problems += _indivisible(follower, f"{name}.{child}", factor)
                if upstream.matches(follower, f"{name}.{child}", factor) != whole:
                    missed["missed" if whole else "compressed"].append(name)
        for name, linear in dense.items():
            problems += _indivisible(follower, name, linear)
        if problems:
            raise ValueError(
                f"{stage} can't compress {len(problems)} modules:\n  "
                + "\n  ".join(problems[:12])
                + ("\n  …" if len(problems) > 12 else "")
                + "\nThe rank is the number of inputs of a second factor: set CURModifier's "
                f"`multiple_of` (now {multiple_of}) to a multiple of the group or block. Where a "
                "dense input is not divisible, choose a size that divides it (64 for 576 inputs), "
                "or put the module on the stage's `ignore`."
            )
        for what, names in missed.items():
            verb = "leaves their factors alone" if what == "missed" else "would still compress them"
            logger.warning(
                f"{stage}'s targets and ignore were written for dense modules: it {verb} in "
                f"{sorted(set(names))[:4]} and alike. Factors are Linears named "
                f"{'/'.join(FACTORED_CLASSES[form].factor_names)} below the module: end a pattern "
                "with `_proj.*` rather than `_proj$`."
            )


def follower_bits(modifier: Modifier, candidate: Candidate, form: Form) -> int | None:
    """Bits to which a later stage will quantize the first factor of ``candidate``, or None."""
    module, skeleton = next(iter(candidate.skeletons(form, device="meta").items()))
    name, factor = next(iter(skeleton.factors.items()))
    bits = (
        upstream.weight_bits(follower, f"{module}.{name}", factor)
        for follower in upstream.followers(modifier)
    )
    return min((b for b in bits if b is not None), default=None)


def _indivisible(follower: Modifier, name: str, linear: nn.Linear) -> list[str]:
    found = [
        f"{name}: {linear.in_features} inputs, group_size {size}"
        for size in upstream.group_sizes(follower, name, linear)
        if linear.in_features % size
    ]
    block = upstream.prune_block(follower)
    if block and linear.in_features % block and upstream.matches(follower, name, linear):
        found.append(f"{name}: {linear.in_features} inputs, sparsity blocks of {block}")
    return found


def _ignored(name: str, module: nn.Module, ignore: Sequence[str]) -> bool:
    return is_match(name, module, list(ignore))


def _refuse_factored(model: nn.Module, name: str, module: nn.Module) -> None:
    parent = model.get_submodule(name.rpartition(".")[0])
    owner = module if isinstance(module, FactoredLinear) else parent
    if isinstance(owner, FactoredLinear):
        raise ValueError(
            f"{name} is already factored by an earlier CURModifier stage or in the checkpoint. "
            "Give each stage its own targets, e.g. with `ignore`."
        )


def _refuse_quantized(name: str, module: nn.Module) -> None:
    if getattr(module, "quantization_scheme", None) is not None:
        raise ValueError(
            f"{name} is already quantized. Factor first: put CURModifier before the quantization "
            "stage, or load the full-precision checkpoint."
        )


def _projections(layers: Sequence[tuple[str, nn.Module]]) -> str:
    names = {
        name.rpartition(".")[2]
        for name, module in layers[0][1].named_modules()
        if isinstance(module, nn.Linear)
    }
    return ", ".join(sorted(names))
