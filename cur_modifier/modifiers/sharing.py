"""Which modules share a skeleton, and what each of them gives to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cur_modifier.linalg import skeleton_shares
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.plan import Candidate

__all__ = ["joined", "with_direct_outputs"]


def joined(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]], candidates: Sequence[Candidate]
) -> list[Candidate]:
    """The candidates, those as one that read the same tensor in the same block of a layer.

    Seen in a forward pass of a few tokens through the dense model, not told by names. Modules of
    different blocks stay apart (in some models attention and MLP read one tensor): they are served
    as different fused modules. So do those that run several times in one pass, and the experts of
    a mixture, i.e. what stands below a ``ModuleList`` inside a layer: which of them read what is up
    to the routing.

    Returns:
        The candidates by layer, each with its members in the order of execution.
    """
    read: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            # Tensors, not their ids: what is let go of leaves its id to another.
            read.setdefault(name, []).append(args[0])

        return hook

    by_name = {c.name: c for c in candidates}
    with ExitStack() as stack:
        device = stack.enter_context(upstream.evaluation_forward(model, logits=False))
        stack.enter_context(torch.no_grad())
        for name in by_name:
            hook = model.get_submodule(name).register_forward_pre_hook(watch(name))
            stack.callback(hook.remove)
        upstream.try_out(model, device)

    groups: dict[tuple[int, str, int | str], list[Candidate]] = {}
    for name in [*read, *(name for name in by_name if name not in read)]:
        candidate, tensors = by_name[name], read.get(name, [])
        routed = _below_a_list(model, layers[candidate.layer][0], name)
        tensor = id(tensors[0]) if len(tensors) == 1 and not routed else name
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
