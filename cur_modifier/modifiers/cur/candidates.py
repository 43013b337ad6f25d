"""The modules that a stage factors, each alone or together with those that read the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.offload import get_offloaded_device
from compressed_tensors.utils import is_match, match_named_modules
from torch import nn

from cur_modifier.forms.base import FactoredLinear, is_factored
from cur_modifier.forms.form import Form
from cur_modifier.forms.sizes import Shape
from cur_modifier.linalg import apportion, skeleton_shares
from cur_modifier.structure.operators import as_matrix
from cur_modifier.structure.readers import called_once, recorded

__all__ = ["Candidate", "find_candidates", "joined", "with_direct_outputs"]


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

    def empty_modules(
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
            return {name: form.build(Shape(m, n, self.rank), bias=self.bias, **like)}
        layers = form.build_shared(
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
                f"{type(model).__name__}. {_projections(layers)} "
                "Regular expressions start with 're:', e.g. 're:.*q_proj$'."
            )
    if not candidates:
        raise ValueError(
            f"nothing is left to factor: targets {list(targets)} in layers {sorted(allowed)} are "
            f"all on ignore {list(ignore)}."
        )
    return sorted(candidates.values(), key=lambda c: c.layer)


def joined(
    model: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    candidates: Sequence[Candidate],
    run: Callable[[], None],
) -> list[Candidate]:
    """The candidates, those as one that read the same tensor in the same block of a layer.

    Seen in a forward pass of a few tokens through the dense model, not told by names. Modules of
    different blocks stay apart (in some models attention and MLP read one tensor): they are served
    as different fused modules. So do those that run several times in one pass, and the experts of
    a mixture, i.e. what stands below a ``ModuleList`` inside a layer: which of them read what is up
    to the routing.

    Args:
        run: the forward pass.

    Returns:
        The candidates by layer, each with its members in the order of execution.
    """
    by_name = {c.name: c for c in candidates}
    with recorded(model, list(by_name)) as calls:
        run()
    once = called_once(calls)
    groups: dict[tuple[int, str, int | str], list[Candidate]] = {}
    for name in [*calls, *(name for name in by_name if name not in calls)]:
        candidate = by_name[name]
        routed = _below_a_list(model, layers[candidate.layer][0], name)
        tensor = once[name].tensor if name in once and not routed else name
        key = (candidate.layer, name.rpartition(".")[0], tensor)
        groups.setdefault(key, []).append(candidate)
    merged = [
        replace(group[0], members={n: m for c in group for n, m in c.members.items()})
        for group in groups.values()
    ]
    return sorted(merged, key=lambda c: c.layer)


def with_direct_outputs(
    candidate: Candidate, multiple_of: int, outputs: torch.Tensor | None
) -> Candidate:
    """The candidate with what each member gives to the skeleton, where it is shared.

    It must be known before the fit, since it decides the members' shapes: it is chosen from the
    dense weights and, with fit ``loss``, the metric ``outputs`` of their stacked outputs.
    """
    if not candidate.shared or candidate.rank is None:
        return candidate
    weight = candidate.weight
    chosen = skeleton_shares(
        weight,
        candidate.rank,
        candidate.sizes,
        multiple_of=multiple_of,
        outputs=None if outputs is None else outputs.to(weight.device),
    )
    return replace(candidate, direct_outputs=tuple(chosen))


def _below_a_list(model: nn.Module, layer: str, name: str) -> bool:
    path = name.removeprefix(f"{layer}.").split(".")[:-1]
    ancestors = (".".join([layer, *path[: depth + 1]]) for depth in range(len(path)))
    return any(isinstance(model.get_submodule(ancestor), nn.ModuleList) for ancestor in ancestors)


def _ignored(name: str, module: nn.Module, ignore: Sequence[str]) -> bool:
    return is_match(name, module, list(ignore))


def _refuse_factored(model: nn.Module, name: str, module: nn.Module) -> None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if is_factored(module) or is_factored(parent):
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
    """What multiplies by a matrix in a layer, and could be meant."""
    linears: set[str] = set()
    others: set[str] = set()
    for name, module in layers[0][1].named_modules():
        if isinstance(module, nn.Linear):
            linears.add(name.rpartition(".")[2])
        elif as_matrix(module) is not None:
            others.add(f"{name} ({type(module).__name__})")
    found = f"Linears there: {', '.join(sorted(linears)) or 'none'}."
    if others:
        found += f" Not yet factored: {', '.join(sorted(others))}."
    return found
