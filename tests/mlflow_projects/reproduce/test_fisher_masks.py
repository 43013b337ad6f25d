"""Kwon et al. 2022: each step against the formula in the paper, written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cur_modifier.structure.removal import Units
from mlflow_projects.reproduce.fisher_masks import prune, rearranged, scales, search
from mlflow_projects.reproduce.sublayers import sublayers


def fisher(units: int, seed: int = 0, samples: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(samples, units, generator=generator, dtype=torch.float64)
    g = g @ (torch.eye(units).double() + 0.4 * torch.randn(units, units, generator=generator))
    return g.mT @ g / samples


# -- search ------------------------------------------------------------------------------------

HEADS, NEURONS = (3, 2), (4, 3)
COSTS = (5, 2)  # of a head, of a neuron


def brute_force(importance: list[torch.Tensor], budget: float) -> float:
    """The most importance that masks with a unit for each sub-layer can keep."""
    sizes = [len(each) for each in importance]
    best = -1.0
    for bits in itertools.product(*(range(1, 2**size) for size in sizes)):
        masks = [
            torch.tensor([bool(b >> k & 1) for k in range(size)])
            for b, size in zip(bits, sizes, strict=True)
        ]
        costs = [COSTS[0], COSTS[1], COSTS[0], COSTS[1]]
        spent = sum(int(m.sum()) * c for m, c in zip(masks, costs, strict=True))
        if spent <= budget:
            best = max(best, sum(float(i[m].sum()) for i, m in zip(importance, masks, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [14, 20, 27, 39])
def test_the_search_finds_the_best_masks(seed: int, budget: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [HEADS[0], NEURONS[0], HEADS[1], NEURONS[1]]
    importance = [torch.rand(size, generator=generator).double() for size in sizes]
    costs = [COSTS[0], COSTS[1], COSTS[0], COSTS[1]]
    kept = search(importance, costs, [True, False, True, False], budget)
    assert sum(len(k) * c for k, c in zip(kept, costs, strict=True)) <= budget
    assert all(len(k) and k.tolist() == sorted(k.tolist()) for k in kept)
    value = sum(float(i[k].sum()) for i, k in zip(importance, kept, strict=True))
    wanted = brute_force(importance, budget)
    # One unit for each sub-layer is settled first; the others are chosen as the paper does.
    assert value == pytest.approx(wanted, rel=1e-6)


def test_a_budget_below_one_unit_each_is_refused() -> None:
    importance = [torch.ones(3), torch.ones(4)]
    with pytest.raises(ValueError, match=r"one unit for each of 2 sub-layers.*Raise it"):
        search(importance, [5, 2], [True, False], 6)
    with pytest.raises(ValueError, match=r"units of one kind cost \[5, 6\]"):
        search([*importance, torch.ones(2)], [5, 2, 6], [True, False, True], 60)


# -- rearrangement -----------------------------------------------------------------------------


def lost(information: torch.Tensor, kept: torch.Tensor) -> float:
    gone = torch.ones(len(information), dtype=torch.float64)
    gone[kept] = 0
    return float(gone @ information @ gone)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 4, 7])
def test_rearranging_never_loses(seed: int, count: int) -> None:
    information = fisher(8, seed)
    kept = information.diagonal().topk(count).indices.sort().values
    again = rearranged(information, kept)
    assert len(again) == count and again.tolist() == sorted(set(again.tolist()))
    assert lost(information, again) <= lost(information, kept) + 1e-12


def test_without_interactions_nothing_is_rearranged() -> None:
    information = torch.diag(torch.tensor([3.0, 1.0, 2.0, 5.0])).double()
    kept = torch.tensor([0, 3])
    assert torch.equal(rearranged(information, kept), kept)


def test_units_that_cancel_go_together() -> None:
    """A unit is missed less together with one whose gradient is the opposite."""
    g = torch.tensor([[0.6, -0.5, -0.4]]).double()
    assert rearranged(g.mT @ g, torch.tensor([0])).tolist() == [2]


# -- tuning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3])
def test_scales_are_the_least_squares_of_the_paper(width: int) -> None:
    """``argmin_r ‖A r + A·1 − b‖² + ‖r‖²``, a column of ``A`` a unit, over all tokens' outputs."""
    generator = torch.Generator().manual_seed(0)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    tokens, m, units = 50, 6, 4
    W, h = torch.randn(m, units * width, **draw), torch.randn(tokens, units * width, **draw)
    wanted = torch.randn(tokens, m, **draw)
    groups = list(torch.arange(units * width).view(units, width))
    A = torch.stack([(h[:, g] @ W[:, g].mT).flatten() for g in groups], dim=1)
    e = wanted.flatten() - A.sum(1)
    padded = torch.cat([A, torch.eye(units, dtype=torch.float64)])
    r = torch.linalg.lstsq(padded, torch.cat([e, torch.zeros(units).double()])).solution
    found = scales(W, h.mT @ h / tokens, wanted.mT @ h / tokens, groups, 1 / tokens)
    torch.testing.assert_close(found, 1 + r)


def test_scales_recover_what_was_scaled() -> None:
    generator = torch.Generator().manual_seed(0)
    W, h = torch.randn(5, 4, generator=generator), torch.randn(200, 4, generator=generator)
    true = torch.tensor([0.5, 2.0, -1.0, 1.0])
    wanted = h @ (W * true).mT
    groups = list(torch.arange(4).view(4, 1))
    found = scales(W, h.mT @ h / 200, wanted.mT @ h / 200, groups, 0.0)
    torch.testing.assert_close(found, true.double(), rtol=1e-4, atol=1e-4)


# -- the whole ---------------------------------------------------------------------------------


def test_a_model_keeps_the_budget(encoder: Any, batches: Any) -> None:
    units, costs = sublayers(encoder, 16)
    before = {u.consumer: encoder.get_submodule(u.consumer).weight.clone() for u in units}
    prune(encoder, batches, 0.5, 16)
    counts = counted(encoder, units)
    assert costs.left(units, counts) <= 0.5 * costs.total
    for each in units:  # what is left are the dense columns, scaled
        for column in encoder.get_submodule(each.consumer).weight.T:
            old = before[each.consumer].T
            cosine = torch.nn.functional.cosine_similarity(old, column[None]).abs()
            assert float(cosine.max()) > 0.9999


def counted(model: Any, units: list[Units]) -> dict[str, int]:
    return {
        u.consumer: model.get_submodule(u.consumer).in_features // u.reads.shape[1] for u in units
    }
