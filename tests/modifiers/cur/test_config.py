"""Ranks and layers as a recipe asks for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llmcompressor")

from cur_modifier.forms.form import Form
from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import FORMS as SIZES
from cur_modifier.modifiers.cur.config import LayersConfig, RankConfig

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


@given(total=st.integers(3, 40), data=st.data())
def test_chosen_layers(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total - 2))
    distances = data.draw(st.lists(st.floats(0, 1), min_size=total, max_size=total))
    config = LayersConfig(count=count)
    chosen = config.choose(config.pool(total), 0, distances)
    assert len(chosen) == count == len(set(chosen)) and chosen == sorted(chosen)
    assert 0 not in chosen and total - 1 not in chosen
    left_out = set(range(1, total - 1)) - set(chosen)
    assert all(distances[i] <= distances[j] for i in chosen for j in left_out)


@pytest.mark.parametrize("select", ["angular", "random", "sensitivity"])
def test_layers_without_targets_are_not_chosen(select: str) -> None:
    pool = {0, 2, 3}
    two = LayersConfig(select=select, count=2)
    two.check_count(pool)
    chosen = two.choose(pool, 0, [0.2, 0.0, 0.1, 0.3])
    assert set(chosen) < pool if select == "random" else chosen == [0, 2]
    with pytest.raises(ValueError, match="count is 4, but the targets match modules in 3 of"):
        LayersConfig(select=select, count=4).check_count(pool)


@given(total=st.integers(3, 40), seed=st.integers(0, 99))
def test_random_layers_follow_the_seed(total: int, seed: int) -> None:
    config = LayersConfig(select="random", count=total - 2)
    pool = config.pool(total)
    assert config.choose(pool, seed, None) == list(range(1, total - 1))
    few = LayersConfig(select="random", count=1)
    assert few.choose(pool, seed, None) == few.choose(set(pool), seed, None)


def test_all_last_and_listed() -> None:
    assert LayersConfig(select="all").pool(4) == [0, 1, 2, 3]
    assert LayersConfig(select="last", count=2).pool(4) == [2, 3]
    assert LayersConfig(select=[3, 1, 3]).pool(4) == [1, 3]
