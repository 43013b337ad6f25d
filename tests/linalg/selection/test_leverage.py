"""Rows by their leverage on a subspace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    leverage_sampled,
    leverage_scores,
    leverage_top,
)

from ..strategies import (
    DTYPES,
    assert_selection,
    bases,
    seeded,
)


@given(bases())
def test_leverage_scores_sum_to_the_rank(V):
    scores = leverage_scores(V)
    assert float(scores.sum()) == pytest.approx(V.shape[1])
    assert (scores >= 0).all()
    assert (scores <= 1 + 1e-12).all()


@given(bases())
def test_leverage_top_are_the_largest(V):
    scores, chosen = leverage_scores(V), leverage_top(V)
    unchosen = torch.ones(V.shape[0], dtype=torch.bool).index_fill(0, chosen, False)
    assert unchosen.sum() == 0 or scores[chosen].min() >= scores[unchosen].max()


def test_leverage_sampling_follows_the_scores():
    V = torch.tensor([[0.8], [0.6], [0.0]])
    generator = seeded(0)
    draws = torch.cat([leverage_sampled(V, generator) for _ in range(4000)])
    shares = draws.bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, V[:, 0] ** 2, rtol=0, atol=0.03)


ON_A_BASIS = {"top": leverage_top, "sampled": lambda V: leverage_sampled(V, seeded(0))}


@given(bases(), st.sampled_from(sorted(ON_A_BASIS)), DTYPES)
def test_rows_are_distinct_and_in_range(V, name, dtype):
    V = V.to(dtype)
    before = V.clone()
    assert_selection(ON_A_BASIS[name](V), V.shape[1], V.shape[0])
    assert torch.equal(V, before)


@pytest.mark.parametrize("name", [*ON_A_BASIS, "scores"])
def test_a_bad_basis_is_named(name):
    select = {**ON_A_BASIS, "scores": leverage_scores}[name]
    with pytest.raises(ValueError, match=r"basis.*NaN"):
        select(torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match=r"basis has shape \(2, 4\).*as many rows as columns"):
        select(torch.ones(2, 4))
