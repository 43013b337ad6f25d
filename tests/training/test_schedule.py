"""Rates, order and stopping: what makes a continued run the same run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.training.schedule import History, Plateau, batch_at, split, warmup_cosine

pytest.importorskip("llmcompressor")


@given(steps=st.integers(1, 300), data=st.data())
def test_the_rate_rises_linearly_and_then_falls(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    rates = [warmup_cosine(s, steps=steps, warmup=warmup) for s in range(1, steps + 1)]
    assert all(0 < rate <= 1 for rate in rates)
    for step in range(1, warmup):
        assert rates[step - 1] == pytest.approx(step / warmup)
    after = rates[max(warmup, 1) - 1 :]
    assert all(a >= b for a, b in pairwise(after))
    if warmup:
        assert rates[warmup - 1] == 1


@given(samples=st.integers(2, 200), share=st.floats(0.01, 0.5), seed=st.integers(0, 2**40))
def test_a_split_covers_every_sample_once(samples: int, share: float, seed: int) -> None:
    train, held_out = split(samples, share, seed)
    assert sorted(train + held_out) == list(range(samples))
    assert len(held_out) == max(1, round(samples * share))
    assert split(samples, share, seed) == (train, held_out)


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"1 calibration samples can't be split.*more samples"):
        split(1, 1 / 8, 0)


@given(
    samples=st.integers(1, 20),
    batch=st.integers(1, 50),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_epoch_is_a_permutation(samples: int, batch: int, epochs: int, seed: int) -> None:
    steps = math.ceil(samples * epochs / batch)
    drawn = [
        place
        for step in range(1, steps + 1)
        for place in batch_at(step, batch_size=batch, samples=samples, seed=seed)
    ]
    for epoch in range(epochs):
        part = drawn[epoch * samples : (epoch + 1) * samples]
        assert sorted(part) == list(range(samples))


def test_the_order_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = batch_at(3, batch_size=4, samples=7, seed=1)
    split(9, 0.2, 1)
    assert torch.equal(torch.rand(1), expected)
    assert batch_at(3, batch_size=4, samples=7, seed=1) == first
    assert any(batch_at(3, batch_size=4, samples=7, seed=s) != first for s in range(2, 6))


@given(
    values=st.lists(st.one_of(st.floats(0, 10), st.just(math.nan)), min_size=1, max_size=30),
    patience=st.integers(1, 5),
)
def test_a_plateau_is_patience_values_without_a_new_best(
    values: list[float], patience: int
) -> None:
    plateau = Plateau(patience)
    for step, value in enumerate(values):
        improved = plateau.update(step, value)
        seen = [v for v in values[: step + 1] if not math.isnan(v)]
        assert plateau.best == min(seen, default=math.inf)
        assert improved == (plateau.best_step == step and bool(seen) and value == plateau.best)
        assert plateau.stopped == (plateau.waited >= patience)
        if improved:
            assert plateau.waited == 0


def test_stagnation_is_a_second_half_that_gains_nothing() -> None:
    falling = History(validation=[(s, 1 / (1 + s), 0.0) for s in range(0, 50, 10)])
    flat = History(validation=[(0, 1.0, 0), (10, 0.5, 0), (20, 0.5, 0), (30, 0.499, 0)])
    assert not falling.stagnated(0.02)
    assert flat.stagnated(0.02)
    assert not History(validation=flat.validation[:3]).stagnated(0.02)
