"""Fisher masks with mask tuning: "A Fast Post-Training Pruning Framework for Transformers".

Kwon et al. 2022, with our units, costs and removal. A mask ``m`` of one number a head or neuron
multiplies what consumers read; ``I = E[g gᵀ]`` is the Fisher information of the task's loss at
``m = 1``. Three steps:

1. search: which units go under the budget, by the diagonal of ``I`` over the whole model;
2. rearrangement: as many of them in every sub-layer, by the sub-layer's own block of ``I``;
3. tuning: one scale for each unit that is left, by least squares on the dense sub-layer's output.

The scales end up in the consumer's columns. Another than the paper's is only that every sub-layer
keeps a unit at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cur_modifier.structure.operators import matrix_of
from cur_modifier.structure.removal import Units, remove
from mlflow_projects.reproduce.masks import Batch, Settled, masks_of
from mlflow_projects.reproduce.sublayers import (
    columns_of,
    outputs_of,
    reading,
    sublayers,
)

__all__ = ["prune", "rearranged", "scales", "search"]

LARGEST_SCALE = 10  # a layer with a larger one is left untuned, and so are those behind it


def prune(model: Any, batches: Sequence[Batch], share: float, sequence_length: int) -> None:
    """Prune a model in place to a share of its multiply-accumulates.

    Args:
        batches: with labels, padded.

    Cost: a pass of gradients, and a pass up to each sub-layer of both models.
    """
    units, costs = sublayers(model, sequence_length)
    settled = Settled(model, batches)
    gradients = masks_of(model, units, batches, _task_loss, settled).gradients
    wanted = outputs_of(model, units, batches)
    fisher = {name: g.mT @ g / len(g) for name, g in gradients.items()}
    kept = search(
        [fisher[each.consumer].diagonal() for each in units],
        [costs.unit[each.consumer] for each in units],
        [each.kind == "heads" for each in units],
        share * costs.total - (costs.total - sum(u.count * costs.unit[u.consumer] for u in units)),
    )
    tuned = True
    for place, (each, found_mask) in enumerate(zip(units, kept, strict=True)):
        chosen = rearranged(fisher[each.consumer], found_mask)
        read = reading(model, each, batches, settled)
        W, columns, found = _tuned(model, each, chosen, wanted[each.consumer], *read)
        tuned = tuned and bool((found.abs() <= LARGEST_SCALE).all())
        if not tuned:
            found = torch.ones_like(found)
        remove(model, each, chosen, W[:, columns] * found)
        if place + 1 < len(units) and units[place + 1].layer != each.layer:
            settled.settle(each.layer)


def search(
    importance: Sequence[torch.Tensor], costs: Sequence[int], heads: Sequence[bool], budget: float
) -> list[torch.Tensor]:
    """Units to keep of each sub-layer (indices, ascending): the most important ones of the model.

    Minimises ``Σ I_ii`` of what goes under ``Σ cost ≤ budget``: for every number of heads that
    stays the best heads and, with what they leave of the budget, the best neurons; then the best
    number. All heads cost the same, and all neurons.

    Args:
        importance: ``(units,)`` of each sub-layer, ``I_ii``.
        costs: of one unit of each.
        heads: which sub-layers are attention.

    Raises:
        ValueError: units of one kind cost different amounts, or one unit for each sub-layer is more
            than the budget.
    """
    kinds = [
        _Kind(importance, costs, [i for i, h in enumerate(heads) if h is k]) for k in (True, False)
    ]
    first, second = kinds
    best: tuple[float, int, int] | None = None
    for number in range(first.least, len(first.order) + 1):
        others = min(int((budget - number * first.cost) // second.cost), len(second.order))
        if others < second.least:
            break
        value = float(first.sums[number] + second.sums[others])
        if best is None or value > best[0]:
            best = (value, number, others)
    if best is None:
        raise ValueError(
            f"one unit for each of {len(importance)} sub-layers is more than the {budget:.0f} "
            "multiply-accumulates that the budget allows. Raise it."
        )
    kept: list[list[int]] = [[] for _ in importance]
    for kind, number in zip(kinds, best[1:], strict=True):
        for sub, unit in kind.order[:number]:
            kept[sub].append(unit)
    return [torch.tensor(sorted(each)) for each in kept]


class _Kind:
    """All units of one kind: the best of each sub-layer, then the most important of the others."""

    def __init__(
        self, importance: Sequence[torch.Tensor], costs: Sequence[int], places: Sequence[int]
    ) -> None:
        if len({costs[place] for place in places}) != 1:
            raise ValueError(
                f"units of one kind cost {sorted({costs[place] for place in places})}; the search "
                "of Kwon et al. wants layers that are alike."
            )
        self.cost = costs[places[0]]
        self.least = len(places)
        best = {(p, int(importance[p].argmax())) for p in places}
        every = [(p, unit) for p in places for unit in range(len(importance[p]))]
        self.order = sorted(every, key=lambda e: (e not in best, -float(importance[e[0]][e[1]])))
        values = torch.tensor([float(importance[p][unit]) for p, unit in self.order])
        self.sums = torch.cat([torch.zeros(1), values.double().cumsum(0)])


def rearranged(fisher: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """As many units (indices, ascending), chosen by a whole block of the Fisher information.

    Lowers ``(1 − m)ᵀ I (1 − m)`` from the mask of the search: each unit that it keeps, the least
    important first, goes as well, and the one comes back that lowers this most.

    Args:
        fisher: ``I (units, units)`` of one sub-layer.
        kept: units that the search keeps.

    Cost: ``units²``.
    """
    mask = torch.zeros(len(fisher), dtype=torch.bool)
    mask[kept] = True
    gone = ~mask
    diagonal = fisher.diagonal()
    touched = fisher[:, gone].sum(1)  # I (1 − m)
    for unit in sorted(kept.tolist(), key=lambda k: float(diagonal[k])):
        gone[unit] = True
        touched = touched + fisher[:, unit]
        gain = torch.where(gone, 2 * touched - diagonal, -torch.inf)
        back = int(gain.argmax())
        gone[back] = False
        touched = touched - fisher[:, back]
    return (~gone).nonzero().flatten()


def scales(
    W: torch.Tensor,
    gram: torch.Tensor,
    cross: torch.Tensor,
    groups: Sequence[torch.Tensor],
    damping: float,
) -> torch.Tensor:
    """``(groups,)``: one scale for each group of columns, by least squares.

    Minimises ``E‖t − Σ_b s_b W_b h_b‖² + damping ‖s − 1‖²``. With ``A = (WᵀW) ∘ G`` and
    ``c = diag(Wᵀ E[t hᵀ])``, both summed over groups, the scales solve ``(A + d) s = c + d``.

    Args:
        W: ``(m, n)`` of the consumer, of kept features alone.
        gram: ``G = E[h hᵀ] (n, n)``.
        cross: ``E[t hᵀ] (m, n)`` of what the sub-layer is to answer.
        groups: columns of each unit.
    """
    belongs = W.new_zeros(len(groups), W.shape[1], dtype=torch.float64)
    for row, columns in enumerate(groups):
        belongs[row, columns] = 1
    W = W.double()
    A = belongs @ ((W.mT @ W) * gram.double()) @ belongs.mT
    c = belongs @ (W * cross.double()).sum(0)
    A.diagonal().add_(damping)
    return torch.linalg.solve(A, c + damping)


def _tuned(
    model: Any,
    units: Units,
    kept: torch.Tensor,
    target: torch.Tensor,
    h: torch.Tensor,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The consumer's weight, the columns that stay, and the scale of each of them."""
    consumer = model.get_submodule(units.consumer)
    W = matrix_of(consumer)
    bias = 0 if consumer.bias is None else consumer.bias.detach()
    wanted = target - residual - bias
    columns = columns_of(units, kept, W.shape[1])
    h = h[:, columns]
    places = {int(column): place for place, column in enumerate(columns)}
    groups = [torch.tensor([places[int(f)] for f in units.reads[unit]]) for unit in kept]
    found = scales(W[:, columns], h.mT @ h / len(h), wanted.mT @ h / len(h), groups, 1 / len(h))
    each = torch.ones(len(columns), dtype=torch.float64)
    for scale, group in zip(found, groups, strict=True):
        each[group] = scale
    return W, columns, each.to(W)


def _task_loss(outputs: Any, batch: Batch, number: int) -> torch.Tensor:
    loss: torch.Tensor = outputs.loss * len(batch["input_ids"])  # a mean over samples
    return loss
