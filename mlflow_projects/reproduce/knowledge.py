"""Iterative removal with least squares, the idea of K-prune.

Park, Choi and Kang 2024, "Accurate Retraining-free Pruning for Pretrained Encoder-based Language
Models", with our units, costs and removal. Sub-layer by sub-layer, from the first to the last, on
the model as it is by then:

1. a unit's score is what would be lost without it: of predictions, ``½ E[g²]`` with ``g`` the
   gradient, at its mask, of the divergence from the dense model's predictions at temperature 2; and
   of the representation, ``E‖W_b h_b‖²``, with a weight;
2. the units of the largest score for their cost stay, of all sub-layers that are left and under the
   budget that is left; only the first sub-layer among them is pruned now;
3. its consumer is solved anew, so that the sub-layer with its residual answers what it does in the
   dense model.

The scores are those of whole units, as the paper has them. Another than the paper's is only that
every sub-layer keeps a unit at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cur_modifier.linalg import shrunk
from cur_modifier.structure.operators import matrix_of
from cur_modifier.structure.removal import remove
from mlflow_projects.reproduce.masks import Batch, Settled, masks_of
from mlflow_projects.reproduce.sublayers import (
    columns_of,
    densest,
    outputs_of,
    reading,
    sublayers,
)

__all__ = ["divergence", "prune", "refitted", "representation"]

TEMPERATURE = 2.0
REPRESENTATION = 0.00025  # weight of the representation's score beside that of the predictions
SHRINKAGE = 1e-6  # keeps a singular Gram matrix solvable, and no more


def prune(model: Any, batches: Sequence[Batch], share: float, sequence_length: int) -> None:
    """Prune a model in place to a share of its multiply-accumulates.

    Args:
        batches: padded; their labels are not looked at.

    Cost: for each sub-layer a pass of gradients through those behind it, and a pass up to it.
    """
    units, costs = sublayers(model, sequence_length)
    price = {each.consumer: costs.unit[each.consumer] for each in units}
    left = share * costs.total - (costs.total - sum(u.count * price[u.consumer] for u in units))
    wanted = outputs_of(model, units, batches)
    settled = Settled(model, batches)
    with torch.no_grad():
        dense = [model(**batch).logits for batch in batches]

    def lost(outputs: Any, batch: Batch, number: int) -> torch.Tensor:
        return divergence(outputs.logits, dense[number])

    for place, each in enumerate(units):
        ahead = units[place:]
        masks = masks_of(model, ahead, batches, lost, settled)
        scores = []
        for other in ahead:
            name = other.consumer
            W = matrix_of(model.get_submodule(name))
            predicted = masks.gradients[name].square().mean(0) / 2
            represented = representation(W, masks.blocks[name], other.reads)
            scores.append(predicted + REPRESENTATION * represented)
        kept = densest(scores, [price[other.consumer] for other in ahead], left)[0]
        left -= len(kept) * price[each.consumer]
        h, residual = reading(model, each, batches, settled)
        bias = getattr(model.get_submodule(each.consumer), "bias", None)
        target = wanted[each.consumer] - residual - (0 if bias is None else bias.detach())
        columns = columns_of(each, kept, h.shape[1])
        remove(model, each, kept, refitted(target, h[:, columns]))
        if len(ahead) > 1 and ahead[1].layer != each.layer:
            settled.settle(each.layer)


def divergence(logits: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Summed over samples: ``T² KL(softmax(dense ÷ T) ‖ softmax(logits ÷ T))`` of classes, the
    squared error of a score."""
    if logits.shape[-1] == 1:
        return (logits - dense).square().sum()
    before, after = (nn.functional.log_softmax(x / TEMPERATURE, dim=-1) for x in (dense, logits))
    return TEMPERATURE**2 * nn.functional.kl_div(after, before, reduction="sum", log_target=True)


def representation(W: torch.Tensor, blocks: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """``(units,)``: ``E‖W_b h_b‖²``, the sum of ``(W_bᵀ W_b) ∘ G_bb``.

    Args:
        W: ``(m, n)`` of the consumer.
        blocks: ``G_bb = E[h_b h_bᵀ] (units, w, w)``.
        units: ``(units, w)`` features.
    """
    columns = W.double()[:, units]
    return (torch.einsum("muv,muw->uvw", columns, columns) * blocks).sum((1, 2))


def refitted(wanted: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """``argmin_W E‖t − W h‖² (m, k)`` of rows ``t (tokens, m)`` and ``h (tokens, k)``."""
    gram, cross = h.double().mT @ h.double(), wanted.double().mT @ h.double()
    return torch.linalg.solve(shrunk(gram, SHRINKAGE), cross, left=False)
