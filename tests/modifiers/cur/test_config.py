"""Ranks as a recipe asks for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llmcompressor")

from cur_modifier.forms.form import Form
from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import FORMS as SIZES
from cur_modifier.modifiers.cur.config import RankConfig

pytest.importorskip("llmcompressor")


SHAPES = {"m": st.integers(2, 200), "n": st.integers(2, 200)}


FORMS = st.sampled_from([find_form(name) for name in SIZES])


@given(
    form=FORMS, bias=st.booleans(), ratio=st.floats(0.01, 1), multiple=st.integers(1, 16), **SHAPES
)
def test_ratio_is_met_by_the_largest_multiple(
    form: Form, bias: bool, ratio: float, multiple: int, m: int, n: int
) -> None:
    limit = form.sizes.largest_rank(m, n)
    budget = ratio * (m * n + m * bias)
    try:
        rank = RankConfig(ratio=ratio).choose(form, m, n, bias=bias, multiple_of=multiple)
    except ValueError:
        rank = 0
    assert rank is not None and rank % multiple == 0 and rank <= limit
    if rank:
        assert form.sizes.parameters(m, n, rank, bias=bias) <= budget
    following = rank + multiple
    assert following > limit or form.sizes.parameters(m, n, following, bias=bias) > budget


@given(form=FORMS, cap=st.integers(1, 300), **SHAPES)
def test_max_stays_below_break_even(form: Form, cap: int, m: int, n: int) -> None:
    if form.sizes.break_even_rank(m, n) < 1:
        return
    rank = RankConfig(max=cap).choose(form, m, n)
    assert rank is not None and rank <= cap
    assert form.sizes.parameters(m, n, rank) < m * n


@given(form=FORMS, needed=st.integers(1, 200), multiple=st.integers(1, 16), **SHAPES)
def test_energy_rounds_up_or_stays_dense(
    form: Form, needed: int, multiple: int, m: int, n: int
) -> None:
    rank = RankConfig(energy=0.9).choose(form, m, n, needed=needed, multiple_of=multiple)
    if rank is None:
        return
    assert needed <= rank < needed + multiple and rank % multiple == 0
    assert form.sizes.parameters(m, n, rank) < m * n


def test_paper_ranks() -> None:
    """q, k and gate of Llama-3.1-8B at CURing's default."""
    config = RankConfig(max=256)
    for m in (4096, 1024, 14336):
        assert config.choose(find_form("cur"), m, 4096) == 256


def test_a_budget_needs_more_than_its_least() -> None:
    with pytest.raises(ValueError, match=r"ratio 0\.3 is not above least 0\.3"):
        RankConfig(ratio=0.3, budget="sensitivity")
    RankConfig(ratio=0.3, budget="sensitivity", least=0.1)
