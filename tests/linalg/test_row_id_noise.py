"""A fit that expects noise in its skeleton is the best one when the noise comes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    RowID,
    apply_gram,
    gram_norm,
    interpolative,
)

from .strategies import (
    SEEDS,
    gaussian,
    metric_loss,
    seeded,
    weight_and_metrics,
)


def expected_error(W: torch.Tensor, factors: RowID, gram: torch.Tensor, noise: float) -> float:
    """``E‖W x − Ŵ x‖²`` over the interpolated rows if each ``(S x)_i`` errs by ``noise``."""
    power = (apply_gram(factors.S, gram) * factors.S).sum(dim=1)
    amplified = (factors.T.square() * power).sum() * noise
    return gram_norm(W - factors.dense(), gram) ** 2 + float(amplified)


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    generator = seeded(seed)
    inputs = gaussian(40, 12, generator)
    return gaussian(16, 12, generator), inputs.T @ inputs / 40, 8


@given(seed=SEEDS, noise=st.floats(1e-4, 0.3), other=st.floats(0, 0.3), real_rows=st.booleans())
def test_the_expected_noise_is_best(seed: int, noise: float, other: float, real_rows: bool) -> None:
    W, gram, rank = problem(seed)
    rows = torch.arange(rank) if real_rows else None
    fitted = interpolative(W, rank, gram, rows=rows, noise=noise)
    wrong = interpolative(W, rank, gram, rows=rows, noise=other)
    assert expected_error(W, fitted, gram, noise) <= expected_error(W, wrong, gram, noise) * (
        1 + 1e-6
    )


@given(seed=SEEDS)
def test_noise_shrinks_the_interpolation_and_keeps_the_skeleton(seed: int) -> None:
    W, gram, rank = problem(seed)
    exact, careful = (interpolative(W, rank, gram, noise=noise) for noise in (0.0, 0.05))
    assert torch.equal(exact.S, careful.S) and torch.equal(exact.order, careful.order)
    assert careful.T.norm() <= exact.T.norm() * (1 + 1e-9)


@given(seed=SEEDS, plain=st.booleans())
def test_vanishing_noise_changes_nothing(seed: int, plain: bool) -> None:
    W, gram, rank = problem(seed)
    rows, norm = torch.arange(rank), None if plain else gram
    exact, near = (interpolative(W, rank, norm, rows=rows, noise=n) for n in (0.0, 1e-14))
    torch.testing.assert_close(near.T, exact.T, rtol=1e-4, atol=1e-6)


@given(SEEDS, st.tuples(st.integers(4, 14), st.integers(4, 14)))
def test_a_quantized_skeleton_is_made_up_for_in_the_metric(seed, shape):
    W, gram, outputs, _ = weight_and_metrics(seed, shape)
    rank = min(shape) // 2
    exact = interpolative(W, rank, gram, outputs=outputs)
    nearly = interpolative(W, rank, gram, outputs=outputs, noise=1e-12)
    assert torch.equal(exact.S, nearly.S)
    scale = metric_loss(W, torch.zeros_like(W), gram, outputs)
    assert metric_loss(W, nearly.dense(), gram, outputs) <= (
        metric_loss(W, exact.dense(), gram, outputs) + 1e-6 * scale
    )
