"""Decoder layers as a recipe asks for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.cur.choice import candidate_layers, check_count, choose_layers
from cur_modifier.modifiers.cur.config import LayersConfig


@given(total=st.integers(3, 40), data=st.data())
def test_chosen_layers(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, total - 2))
    distances = data.draw(st.lists(st.floats(0, 1), min_size=total, max_size=total))
    config = LayersConfig(count=count)
    chosen = choose_layers(config, candidate_layers(config, total), 0, distances)
    assert len(chosen) == count == len(set(chosen)) and chosen == sorted(chosen)
    assert 0 not in chosen and total - 1 not in chosen
    left_out = set(range(1, total - 1)) - set(chosen)
    assert all(distances[i] <= distances[j] for i in chosen for j in left_out)


@pytest.mark.parametrize("select", ["angular", "random", "sensitivity"])
def test_layers_without_targets_are_not_chosen(select: str) -> None:
    pool = {0, 2, 3}
    two = LayersConfig(select=select, count=2)
    check_count(two, pool)
    chosen = choose_layers(two, pool, 0, [0.2, 0.0, 0.1, 0.3])
    assert set(chosen) < pool if select == "random" else chosen == [0, 2]
    with pytest.raises(ValueError, match="count is 4, but the targets match modules in 3 of"):
        check_count(LayersConfig(select=select, count=4), pool)


@given(total=st.integers(3, 40), seed=st.integers(0, 99))
def test_random_layers_follow_the_seed(total: int, seed: int) -> None:
    config = LayersConfig(select="random", count=total - 2)
    pool = candidate_layers(config, total)
    assert choose_layers(config, pool, seed, None) == list(range(1, total - 1))
    few = LayersConfig(select="random", count=1)
    assert choose_layers(few, pool, seed, None) == choose_layers(few, set(pool), seed, None)


def test_all_last_and_listed() -> None:
    assert candidate_layers(LayersConfig(select="all"), 4) == [0, 1, 2, 3]
    assert candidate_layers(LayersConfig(select="last", count=2), 4) == [2, 3]
    assert candidate_layers(LayersConfig(select=[3, 1, 3]), 4) == [1, 3]
