"""Factorizations in the metric of the loss, and anchored to another stream of inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    PairedMoments,
    anchored_target,
    cur,
    curvature_spectrum,
    damped,
    gram_sqrt,
    interpolative,
    low_rank,
    shrunk,
)

from .strategies import SEEDS, full_gram, gaussian, seeded

SHAPES = st.tuples(st.integers(2, 14), st.integers(2, 14))


def problem(seed, shape):
    m, n = shape
    generator = seeded(seed)
    W = gaussian(m, n, generator)
    return W, full_gram(n, generator), damped(full_gram(m, generator), 0.1), generator


def loss(W, other, gram, outputs):
    error = W - other
    return float(torch.einsum("ij,ik,kl,jl->", error, outputs, error, gram))


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


@given(SEEDS, SHAPES, st.booleans(), st.data())
def test_low_rank_is_optimal_in_both_metrics(seed, shape, diagonal, data):
    W, gram, outputs, _ = problem(seed, shape)
    rank = data.draw(st.integers(1, min(shape)))
    metric = outputs.diagonal() if diagonal else outputs
    full = torch.diag(metric) if diagonal else metric
    found = low_rank(W, rank, gram, outputs=metric).dense()
    values = torch.linalg.svdvals(gram_sqrt(full) @ W @ gram_sqrt(gram))
    best = float(values[rank:].square().sum())
    assert loss(W, found, gram, full) <= best + 1e-7 * float(values[0]) ** 2


@given(SEEDS, SHAPES)
def test_the_spectrum_tells_what_a_truncation_costs(seed, shape):
    W, gram, outputs, _ = problem(seed, shape)
    values = torch.linalg.svdvals(gram_sqrt(outputs) @ W @ gram_sqrt(gram))
    scale = float(values[0]) ** 2
    spectrum = curvature_spectrum(W, gram, outputs)
    torch.testing.assert_close(spectrum, values.square(), atol=1e-9 * scale, rtol=1e-6)
    by_diagonal = curvature_spectrum(W, gram, outputs.diagonal())
    whole = curvature_spectrum(W, gram, torch.diag(outputs.diagonal()))
    torch.testing.assert_close(by_diagonal, whole, atol=1e-9 * scale, rtol=1e-6)


@given(SEEDS, SHAPES, st.data())
def test_the_core_is_optimal_in_both_metrics(seed, shape, data):
    W, gram, outputs, generator = problem(seed, shape)
    rank = data.draw(st.integers(1, min(shape)))
    rows, columns = (torch.randperm(s, generator=generator)[:rank] for s in shape)
    target = W + 0.1 * gaussian(*shape, generator)
    found = cur(W, rows, columns, gram, outputs=outputs, target=target)
    assert torch.equal(found.C, W[:, columns]) and torch.equal(found.R, W[rows])
    before = loss(target, found.dense(), gram, outputs)
    step = 1e-3 * gaussian(rank, rank, generator)
    moved = loss(target, found.C @ (found.U + step) @ found.R, gram, outputs)
    scale = loss(target, torch.zeros_like(W), gram, outputs)
    assert before <= moved + 1e-6 * scale


@given(SEEDS, st.tuples(st.integers(4, 14), st.integers(4, 14)))
def test_a_quantized_skeleton_is_made_up_for_in_the_metric(seed, shape):
    W, gram, outputs, _ = problem(seed, shape)
    rank = min(shape) // 2
    exact = interpolative(W, rank, gram, outputs=outputs)
    nearly = interpolative(W, rank, gram, outputs=outputs, noise=1e-12)
    assert torch.equal(exact.S, nearly.S)
    scale = loss(W, torch.zeros_like(W), gram, outputs)
    assert loss(W, nearly.dense(), gram, outputs) <= (
        loss(W, exact.dense(), gram, outputs) + 1e-6 * scale
    )


@given(SEEDS, SHAPES, st.floats(0, 1))
def test_the_anchored_target_is_the_least_squares_map(seed, shape, anchor):
    W, _, _, generator = problem(seed, shape)
    n = shape[1]
    dense = gaussian(4 * n + 4, n, generator)
    compressed = dense + 0.3 * gaussian(4 * n + 4, n, generator)
    moments = PairedMoments(n)
    moments._gram, moments._drift = moments._gram.double(), moments._drift.double()
    for x, other in zip(compressed.split(5), dense.split(5), strict=True):
        moments.update(x, other)
    gram, drift = moments.moments()
    target = anchored_target(W, gram, drift, anchor)
    wanted = (anchor * dense + (1 - anchor) * compressed) @ W.T
    best = torch.linalg.lstsq(compressed, wanted).solution.T
    torch.testing.assert_close(target, best, atol=1e-6, rtol=1e-6)


@given(SEEDS, st.integers(2, 10))
def test_without_drift_every_anchor_keeps_the_weight(seed, n):
    W, gram, _, _ = problem(seed, (n, n))
    target = anchored_target(W, shrunk(gram, 0.01), torch.zeros_like(gram), 0.7)
    torch.testing.assert_close(target, W)


@given(SEEDS, st.integers(3, 12))
def test_a_massive_feature_leaves_a_half_precision_moment_definite(seed, n):
    x = gaussian(40 * n, n, seeded(seed))
    x[:, 0] = 3000 + x[:, 0]
    moments = PairedMoments(n)
    moments.update(x.bfloat16(), x.bfloat16())
    gram, drift = moments.moments()
    assert float(torch.linalg.eigvalsh(gram.double())[0]) > 0
    assert not drift.any()


@given(SEEDS, st.integers(2, 12))
def test_a_shrunk_gram_has_full_rank_whatever_the_tokens(seed, n):
    x = gaussian(1, n, seeded(seed))
    x[0, 0] *= 1e4  # a massive activation
    torch.linalg.cholesky(shrunk(x.T @ x, 0.1))
    assert float(shrunk(x.T @ x, 0.1)[1, 1]) < 2 * float(x[0, 1] ** 2) + 1e-6 * float(x[0, 0] ** 2)


def test_bad_metrics_are_refused():
    W = gaussian(4, 5, seeded(0))
    with pytest.raises(ValueError, match=r"shape \(5, 5\); expected \(4, 4\)"):
        low_rank(W, 2, outputs=torch.eye(5))
    with pytest.raises(ValueError, match="not positive definite"):
        low_rank(W, 2, outputs=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="not positive definite"):
        low_rank(W, 2, outputs=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="outside"):
        anchored_target(W, torch.eye(5), torch.eye(5), 2.0)
    with pytest.raises(ValueError, match="singular"):
        anchored_target(W, torch.zeros(5, 5), torch.eye(5), 0.5)
    with pytest.raises(ValueError, match="same tokens"):
        PairedMoments(5).update(torch.ones(2, 5), torch.ones(3, 5))
    with pytest.raises(ValueError, match="no token"):
        PairedMoments(5).moments()
