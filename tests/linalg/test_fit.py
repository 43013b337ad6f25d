"""Least squares whose solutions survive their storage."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import gram_norm
from cur_modifier.linalg.fit import fit_right, solve_stored

from .strategies import SEEDS, full_gram, gaussian, grams, matrices, rank_deficient, seeded


@given(SEEDS, st.integers(1, 8), st.integers(1, 4))
def test_a_consistent_system_is_solved(seed, n, columns):
    generator = seeded(seed)
    A, X = gaussian(2 * n + 2, n, generator), gaussian(n, columns, generator)
    torch.testing.assert_close(solve_stored(A, A @ X, torch.float64), X)


@given(SEEDS, st.integers(2, 8), st.sampled_from([1e-9, 1.0, 1e9]))
def test_the_unit_of_a_column_does_not_matter(seed, n, unit):
    """One outlier feature must not make the others look dependent."""
    generator = seeded(seed)
    A, B = gaussian(3 * n, n, generator), gaussian(3 * n, 2, generator)
    scale = torch.ones(n, dtype=torch.float64)
    scale[0] = unit
    plain, scaled = (solve_stored(M, B, torch.float32) for M in (A, A * scale))
    torch.testing.assert_close(scale[:, None] * scaled, plain)


@given(matrices(makers=[rank_deficient], max_side=12, tall=True), SEEDS)
def test_dependent_columns_leave_no_large_entries(A, seed):
    """A direction that float32 can't hold is cut: entries stay far below one by its epsilon."""
    X = solve_stored(A, gaussian(len(A), 2, seeded(seed)), torch.float32)
    unit = torch.linalg.vector_norm(A, dim=0)[:, None] * X
    cutoff = torch.finfo(torch.float32).eps ** 0.5
    assert float(unit.norm()) <= len(A) ** 0.5 / cutoff * 4


def test_columns_of_zeros_get_zeros():
    A = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    X = solve_stored(A, A[:, :1], torch.float32)
    torch.testing.assert_close(X, torch.tensor([[1.0], [0.0]]))


@given(st.data(), SEEDS, st.integers(2, 9), st.integers(1, 6))
def test_no_other_coefficients_are_closer(data, seed, n, rank):
    generator = seeded(seed)
    gram = data.draw(st.none() | grams(n, makers=[full_gram]))
    S, target = gaussian(rank, n, generator), gaussian(4, n, generator)
    X = fit_right(target, S, gram, torch.float64)
    best = gram_norm(target - X @ S, gram)
    moved = X + 1e-3 * gaussian(*X.shape, generator)
    assert best <= gram_norm(target - moved @ S, gram) * (1 + 1e-9) + 1e-9


@given(SEEDS, st.floats(1e-3, 1))
def test_noise_shrinks_the_coefficients(seed, noise):
    generator = seeded(seed)
    S, target, gram = gaussian(4, 9, generator), gaussian(3, 9, generator), full_gram(9, generator)
    exact, careful = (fit_right(target, S, gram, torch.float64, level) for level in (0.0, noise))
    power = (S @ gram * S).sum(1).sqrt()  # in the units in which the noise is given
    assert float((careful * power).norm()) < float((exact * power).norm())


@given(SEEDS)
def test_noise_without_a_metric_is_noise_in_the_plain_one(seed):
    generator = seeded(seed)
    S, target = gaussian(4, 9, generator), gaussian(3, 9, generator)
    plain, eye = (fit_right(target, S, G, torch.float64, 0.1) for G in (None, torch.ones(9)))
    torch.testing.assert_close(plain, eye.to(plain))
