"""Rates, order, stopping, coordinates and saving: what makes a continued run the same run."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llmcompressor")


from cur_modifier.checkpoint.files import digest
from cur_modifier.training.coordinates import Coordinates, inverse_root
from cur_modifier.training.schedule import History, Plateau, batch_at, split, warmup_cosine
from cur_modifier.training.state import TrainingState


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


@given(p=st.integers(1, 8), q=st.integers(1, 8), cur=st.booleans(), seed=st.integers(0, 999))
def test_coordinates_are_round(p: int, q: int, cur: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    F0 = torch.randn(p, q, generator=generator)
    L = torch.randn(p + 3, p, generator=generator) if cur else torch.eye(p)
    Z = torch.randn(q, 4 * q, generator=generator)
    inputs = Z @ Z.T / Z.shape[1]
    output = L.T @ L if cur else None
    coordinates = Coordinates(F0, output, inputs)
    assert torch.equal(coordinates.at(coordinates.D), F0)
    # The unit is the root mean square of an output, spread over the entries.
    energy = (L @ F0 @ Z).square().sum() / Z.shape[1]
    assert coordinates.unit == pytest.approx(math.sqrt(energy / F0.numel()), rel=1e-3)
    # The gradient of D is the chain rule's.
    target = torch.randn(p, q, generator=generator)
    (coordinates.value * target).sum().backward()
    coordinates.pull_gradient()
    D = torch.zeros(p, q, requires_grad=True)
    (coordinates.at(D) * target).sum().backward()
    torch.testing.assert_close(coordinates.D.grad, D.grad, rtol=1e-4, atol=1e-5)
    assert coordinates.value.grad is None


def test_a_change_of_one_entry_is_worth_the_same_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(12, 4, generator=generator) @ torch.diag(torch.tensor([1.0, 3, 0.3, 9]))
    Z = torch.diag(torch.tensor([5.0, 0.5, 2.0])) @ torch.randn(3, 4000, generator=generator)
    coordinates = Coordinates(torch.randn(4, 3), L.T @ L, Z @ Z.T / 4000)
    effects = []
    for entry in range(12):
        D = torch.zeros(12)
        D[entry] = 1
        change = coordinates.at(D.view(4, 3)) - coordinates.start
        effects.append(float((L @ change @ Z).square().sum() / 4000))
    assert max(effects) < 2 * min(effects)  # 90,000 in entries of F; damping keeps it from 1


def test_inverse_root_of_nothing_is_the_identity() -> None:
    assert torch.equal(inverse_root(torch.zeros(3, 3)), torch.eye(3))


def test_digest_tells_values_shapes_and_dtypes_apart() -> None:
    x = torch.arange(6.0)
    others = [x + 1, x.view(2, 3), x.double(), x.bfloat16(), torch.empty(0)]
    assert digest([x]) == digest([x.clone()])
    assert len(Counter([digest([x]), *(digest([o]) for o in others)])) == 6


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    checkpoint = TrainingState(tmp_path / "new" / "folder", {"setting seed": "0"})
    assert checkpoint.load() is None
    tensors = {"D.a": torch.randn(3, 2), "best.a": torch.zeros(3, 2).T}
    plateau = Plateau(3, best=0.1, best_step=4, waited=1)
    history = History([(1, 0.3, 1e-3)], [(0, 1 / 3, 0.25)])
    checkpoint.save(tensors, 7, plateau, history)
    loaded = checkpoint.load()
    assert loaded is not None
    assert all(torch.equal(loaded[0][key], value) for key, value in tensors.items())
    assert loaded[1:] == (7, plateau, history)
    assert [p.name for p in checkpoint.path.parent.iterdir()] == [TrainingState.NAME]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    saved = TrainingState(tmp_path, {"setting seed": "0", "calibration tokens": "ab" * 32})
    saved.save({"D.a": torch.zeros(1)}, 1, Plateau(1), History())
    other = TrainingState(tmp_path, {"setting seed": "1", "calibration tokens": "ab" * 32})
    with pytest.raises(ValueError, match=r"(?s)setting seed: was 0, is 1\nRestore.*delete the"):
        other.load()


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint = TrainingState(tmp_path, {})
    checkpoint.path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"can't be read as a saved training state.*Delete"):
        checkpoint.load()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint_dir .*file.* can't be made"):
        TrainingState(tmp_path / "file", {})
