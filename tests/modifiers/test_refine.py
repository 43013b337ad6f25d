"""What a step of refinement is measured in."""

from __future__ import annotations

import pytest
import torch

from cur_modifier.forms.base import FactoredLinear, Surroundings
from cur_modifier.forms.cur import CURLinear
from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.linalg import cur, interpolative

pytest.importorskip("llmcompressor")


def positive(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    return x.T @ x / len(x)


def layer(form: str) -> FactoredLinear:
    W = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    if form == "id":
        return RowIDLinear.from_factors(interpolative(W, 5))
    rows, columns = torch.tensor([0, 3, 7, 8]), torch.tensor([1, 2, 5, 8])
    return CURLinear.from_factors(cur(W, rows, columns))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("form", ["cur", "id"])
def test_a_change_of_a_factor_costs_what_its_metrics_say(form: str, diagonal: bool) -> None:
    module = layer(form).double()
    G, H = positive(9, 1), positive(12, 2)
    H = torch.diag(H.diagonal()) if diagonal else H
    around = module.metrics(Surroundings(G, H.diagonal() if diagonal else H))
    before = module.dense_weight()
    assert set(around) == set(module.factors)
    for name, factor in module.factors.items():
        output, inputs = around[name]
        change = torch.randn(factor.weight.shape, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            factor.weight += change
            moved = module.dense_weight() - before
            factor.weight -= change
        cost = torch.einsum("ij,ik,kl,jl->", moved, H, moved, G)
        if output is None:
            # Left out where it would be a large diagonal: of the outputs that the factor makes.
            made = H.diagonal()[module.order >= module.rank] if form == "id" else H.diagonal()
            places = (
                module.order[module.order >= module.rank] - module.rank if form == "id" else None
            )
            output = torch.diag(made if places is None else made[torch.argsort(places)])
        predicted = torch.einsum("ij,ik,kl,jl->", change.double(), output, change.double(), inputs)
        torch.testing.assert_close(predicted, cost)
