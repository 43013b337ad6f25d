"""Ranks of candidates: by a rule of each, or out of one budget."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import FORMS, dense_parameters
from cur_modifier.modifiers.cur.candidates import Candidate
from cur_modifier.modifiers.cur.config import RankConfig
from cur_modifier.modifiers.cur.ranks import expected_growth, with_budget, with_ranks

SIDES = st.tuples(st.integers(8, 40), st.integers(8, 40))


def candidates(shapes: list[tuple[int, int]], *, bias: bool = False) -> list[Candidate]:
    return [
        Candidate({f"layers.{k}.q": nn.Linear(n, m, bias=bias, device="meta")}, layer=k)
        for k, (m, n) in enumerate(shapes)
    ]


def spectra(given: list[Candidate], scales: list[float]) -> dict[str, torch.Tensor]:
    return {
        c.name: scale * torch.arange(1, min(c.shape) + 1).double() ** -2.0
        for c, scale in zip(given, scales, strict=True)
    }


@given(st.sampled_from(list(FORMS)), st.lists(SIDES, min_size=1, max_size=4), st.booleans())
def test_every_candidate_gets_the_rank_of_its_own_size(
    name: str, shapes: list[tuple[int, int]], bias: bool
) -> None:
    form, rule = find_form(name), RankConfig(ratio=0.9)
    given_ = candidates(shapes, bias=bias)
    for before, after in zip(given_, with_ranks(given_, form, rule, 1), strict=True):
        m, n = before.shape
        assert after.rank == rule.choose(form, m, n, bias=bias)
        assert after.members is before.members and before.rank is None


def test_energies_come_by_name_and_what_is_too_large_stays_dense() -> None:
    given_ = candidates([(32, 32), (32, 32)])
    energies = {"layers.0.q": 5, "layers.1.q": 31}
    found = with_ranks(given_, find_form("cur"), RankConfig(energy=0.9), 4, energies)
    assert [c.rank for c in found] == [8, None]


def test_the_module_is_named_where_no_rank_meets_the_wish() -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.q: ratio 0\.3 .* for a 8x8 weight"):
        with_ranks(candidates([(64, 64), (8, 8)]), find_form("cur"), RankConfig(ratio=0.3), 4)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.floats(0.5, 0.9))
def test_a_budget_holds_over_all_candidates(scales: list[float], ratio: float) -> None:
    form, given_ = find_form("id"), candidates([(32, 24)] * len(scales))
    rule = RankConfig(ratio=ratio, budget="sensitivity")
    found = with_budget(given_, form, rule, 2, spectra(given_, scales))
    dense = dense_parameters(32, 24)
    stored = [dense if c.rank is None else form.sizes.parameters(32, 24, c.rank) for c in found]
    assert sum(stored) <= ratio * dense * len(scales)
    assert all(c.rank is None or c.rank % 2 == 0 for c in found)
    for a, b in zip(range(len(scales)), range(1, len(scales)), strict=False):
        if scales[a] > 2 * scales[b]:  # what the loss minds more never gets clearly less
            assert stored[a] >= stored[b] - form.sizes.parameters(32, 24, 2)


def test_a_budget_that_cannot_hold_is_refused_before_anything_is_measured() -> None:
    rule = RankConfig(ratio=0.35, budget="sensitivity")
    with pytest.raises(ValueError, match=r"ratio 0\.35 allows .* but the least ranks"):
        with_budget(candidates([(16, 16)]), find_form("cur"), rule, 8, None)


def test_growth_is_half_of_what_the_ranks_leave() -> None:
    given_ = candidates([(8, 8), (8, 8)])
    squares = {"layers.0.q": torch.arange(8.0, 0, -1), "layers.1.q": torch.zeros(8)}
    form, rule = find_form("low_rank"), RankConfig(fixed=6)
    growth = expected_growth(given_, form, rule, 1, squares, 3)
    assert growth == [(2 + 1) / 2, 0.0, math.inf]


def test_growth_at_a_budget_is_that_of_its_ratio_for_each() -> None:
    given_ = candidates([(16, 16)])
    squares = spectra(given_, [1.0])
    form = find_form("id")
    budget, uniform = (
        expected_growth(given_, form, RankConfig(ratio=0.8, budget=by), 1, squares, 1)
        for by in ("sensitivity", "uniform")
    )
    assert budget == uniform
