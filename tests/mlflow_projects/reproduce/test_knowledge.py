"""K-prune's idea: scores and weights against the formulas in the paper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mlflow_projects.reproduce.knowledge import (
    TEMPERATURE,
    divergence,
    prune,
    refitted,
    representation,
)
from mlflow_projects.reproduce.sublayers import sublayers


def test_representation_is_what_a_unit_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(70, 6, generator=generator, dtype=torch.float64)
    W = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    for units in (torch.arange(6)[:, None], torch.arange(6).view(3, 2)):
        rows = h[:, units]
        blocks = torch.einsum("tuv,tuw->uvw", rows, rows) / len(h)
        wanted = [(h[:, b] @ W[:, b].mT).square().sum(1).mean() for b in units]
        torch.testing.assert_close(representation(W, blocks, units), torch.stack(wanted))


def test_divergence_of_classes_and_of_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4, 3, generator=generator).double()
    p, q = (torch.softmax(x / TEMPERATURE, -1) for x in (other, one))
    wanted = TEMPERATURE**2 * (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(divergence(one, other), wanted)
    assert float(divergence(other, other)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(
        divergence(one[:, :1], other[:, :1]), (one - other)[:, 0].square().sum()
    )


def test_the_consumer_is_solved_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(80, 5, generator=generator, dtype=torch.float64)
    wanted = torch.randn(80, 3, generator=generator, dtype=torch.float64)
    solution = torch.linalg.lstsq(h, wanted).solution.mT
    torch.testing.assert_close(refitted(wanted, h), solution, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.6, 0.3])
def test_a_model_keeps_the_budget(encoder: Any, batches: Any, share: float) -> None:
    units, costs = sublayers(encoder, 16)
    prune(encoder, batches, share, 16)
    counts = {
        u.consumer: encoder.get_submodule(u.consumer).in_features // u.reads.shape[1] for u in units
    }
    assert costs.left(units, counts) <= share * costs.total
    assert all(counts.values())


def test_with_all_units_nothing_changes(encoder: Any, batches: Any) -> None:
    dense = copy.deepcopy(encoder)
    prune(encoder, batches, 1.0, 16)
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(
                encoder(**batch).logits, dense(**batch).logits, rtol=1e-3, atol=1e-3
            )
