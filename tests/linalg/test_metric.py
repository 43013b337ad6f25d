"""Metrics of inputs and outputs: roots, norms, damping and spectra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    apply_gram,
    curvature_spectrum,
    damped,
    gram_norm,
    gram_sqrt,
    shrunk,
)

from .strategies import (
    DTYPES,
    GRAMS,
    SEEDS,
    SHAPES,
    full_gram,
    gaussian,
    grams,
    matrices,
    seeded,
    weight_and_metrics,
)


@given(st.integers(1, 20).flatmap(grams))
def test_square_root_squares_back(gram):
    root = gram_sqrt(gram)
    full = torch.diag(gram) if gram.ndim == 1 else gram
    full_root = torch.diag(root) if root.ndim == 1 else root
    assert root.dtype == torch.float64
    torch.testing.assert_close(full_root @ full_root, full)
    torch.testing.assert_close(full_root, full_root.T)


@given(st.integers(1, 20).flatmap(grams))
def test_inverse_root_is_a_pseudo_inverse_on_the_range(gram):
    root, inverse = gram_sqrt(gram), gram_sqrt(gram, inverse=True)
    if gram.ndim == 1:
        root, inverse, gram = torch.diag(root), torch.diag(inverse), torch.diag(gram)
    projector = inverse @ root
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(projector, projector.T, **close)
    torch.testing.assert_close(projector @ projector, projector, **close)
    torch.testing.assert_close(projector @ gram, gram, **close)


def test_inverse_root_of_nothing_is_nothing():
    for gram in (torch.zeros(3, 3), torch.zeros(3)):
        assert not gram_sqrt(gram, inverse=True).any()


@given(st.data(), matrices())
def test_norms_agree_with_their_definition(data, W):
    gram = data.draw(grams(W.shape[1]))
    root = gram_sqrt(gram)
    image = W * root if root.ndim == 1 else W @ root
    # The trace sums squares of size ‖W‖² max(G): this is what rounding leaves of it.
    slack = 1e-7 * float(W.norm() * gram.abs().max().sqrt())
    expected = float(torch.linalg.matrix_norm(image))
    assert gram_norm(W, gram) == pytest.approx(expected, rel=1e-6, abs=slack)
    assert gram_norm(W) == pytest.approx(float(torch.linalg.matrix_norm(W)))


@given(SEEDS, st.integers(1, 12))
def test_diagonal_means_the_full_matrix_with_that_diagonal(seed, n):
    generator = seeded(seed)
    W, gram = gaussian(4, n, generator), torch.rand(n, generator=generator).double()
    torch.testing.assert_close(apply_gram(W, gram), apply_gram(W, torch.diag(gram)))
    torch.testing.assert_close(torch.diag(gram_sqrt(gram)), gram_sqrt(torch.diag(gram)))
    assert gram_norm(W, gram) == pytest.approx(gram_norm(W, torch.diag(gram)))


@given(SEEDS, DTYPES)
def test_inputs_are_not_mutated(seed, dtype):
    generator = seeded(seed)
    x = gaussian(6, 6, generator).to(dtype)
    for gram in (make(6, generator).to(dtype) for make in GRAMS):
        before, x_before = gram.clone(), x.clone()
        apply_gram(x, gram)
        gram_norm(x, gram)
        gram_sqrt(gram)
        gram_sqrt(gram, inverse=True)
        assert torch.equal(gram, before)
        assert torch.equal(x, x_before)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(3,), (3, 3)])
def test_nan_in_the_gram_matrix_is_named(shape, inverse):
    with pytest.raises(ValueError, match=r"Gram matrix.*NaN"):
        gram_sqrt(torch.full(shape, torch.nan), inverse=inverse)


@pytest.mark.parametrize("gram", [torch.eye(4), torch.ones(4), torch.ones(3, 4)])
def test_gram_of_the_wrong_size_is_named(gram):
    with pytest.raises(ValueError, match=r"Gram matrix.*4.*3"):
        gram_norm(torch.ones(2, 3), gram)


def test_norm_of_nan_is_named():
    with pytest.raises(ValueError, match=r"matrix.*NaN"):
        gram_norm(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match=r"Gram matrix.*NaN"):
        gram_norm(torch.ones(2, 3), torch.full((3,), torch.nan))
    assert gram_norm(torch.ones(2, 3), full_gram(3, seeded(0))) > 0


@given(SEEDS, st.integers(1, 4))
def test_a_metric_that_was_rounded_is_definite_when_damped(seed, tokens):
    """Few tokens, of which one has massive gradients: rounding to 16 bits exceeds the damping."""
    generator = seeded(seed)
    g = gaussian(tokens, 200, generator) * (2 * gaussian(1, 200, generator)).exp()
    exact = g.mT @ g
    rounded = exact.to(torch.bfloat16)
    found = damped(rounded, 1e-3)
    assert not int(torch.linalg.cholesky_ex(found).info)
    assert torch.linalg.norm(found - exact) < 0.01 * torch.linalg.norm(exact)
    # Nothing is done to one that rounding left definite.
    definite = exact + torch.eye(200) * exact.diagonal().max()
    torch.testing.assert_close(
        damped(definite, 0.5), definite + 0.5 * definite.diagonal().mean() * torch.eye(200)
    )


@given(SEEDS, st.integers(2, 12))
def test_a_shrunk_gram_has_full_rank_whatever_the_tokens(seed, n):
    x = gaussian(1, n, seeded(seed))
    x[0, 0] *= 1e4  # a massive activation
    torch.linalg.cholesky(shrunk(x.T @ x, 0.1))
    assert float(shrunk(x.T @ x, 0.1)[1, 1]) < 2 * float(x[0, 1] ** 2) + 1e-6 * float(x[0, 0] ** 2)


@given(SEEDS, SHAPES)
def test_the_spectrum_tells_what_a_truncation_costs(seed, shape):
    W, gram, outputs, _ = weight_and_metrics(seed, shape)
    values = torch.linalg.svdvals(gram_sqrt(outputs) @ W @ gram_sqrt(gram))
    scale = float(values[0]) ** 2
    spectrum = curvature_spectrum(W, gram, outputs)
    torch.testing.assert_close(spectrum, values.square(), atol=1e-9 * scale, rtol=1e-6)
    by_diagonal = curvature_spectrum(W, gram, outputs.diagonal())
    whole = curvature_spectrum(W, gram, torch.diag(outputs.diagonal()))
    torch.testing.assert_close(by_diagonal, whole, atol=1e-9 * scale, rtol=1e-6)


@given(SEEDS, st.booleans())
def test_each_block_s_metric_is_damped_by_its_own_mean(seed, full):
    """One block's gradients may be a million times another's."""
    generator = seeded(seed)
    small, large = (scale * full_gram(n, generator) for scale, n in ((1e-6, 4), (1.0, 6)))
    if not full:
        small, large = small.diagonal(), large.diagonal()
    joint = torch.block_diag(small, large) if full else torch.cat([small, large])
    found = damped(joint, 0.1, [4, 6])
    wanted = [damped(small, 0.1), damped(large, 0.1)]
    expected = torch.block_diag(*wanted) if full else torch.cat(wanted)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
