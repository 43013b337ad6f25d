"""Plain pairs: optimal under both metrics, and what a problem asks for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    LowRank,
    Problem,
    gram_norm,
    gram_sqrt,
    interpolative,
    low_rank,
)
from cur_modifier.linalg.low_rank import solve

from .strategies import (
    GRAMS,
    SEEDS,
    SHAPES,
    gaussian,
    grams,
    matrices_and_ranks,
    metric_loss,
    seeded,
    weight_and_metrics,
)

# Half the digits: what is left of a quantity that was squared on the way (eigenvalues of W G Wᵀ),
# or that a core U with entries up to 1/√eps multiplies.
HALF = 1e-7


def positive(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    return x.T @ x / len(x)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 9), st.integers(0, 99))
def test_no_other_pair_of_the_rank_is_closer(m: int, n: int, rank: int, seed: int) -> None:
    """Eckart and Young: what is left is the tail of the spectrum of ``H^{1/2} W G^{1/2}``."""
    rank = min(rank, m, n)
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).double()
    G, H = positive(n, seed + 1), positive(m, seed + 2)
    pair = solve(Problem(W=W, rank=rank, gram=G, outputs=H))
    assert isinstance(pair, LowRank) and pair.rank == rank and pair.shape == (m, n)
    root_g, root_h = torch.linalg.cholesky(G), torch.linalg.cholesky(H)
    left = root_h.T @ (W - pair.dense()) @ root_g
    spectrum = torch.linalg.svdvals(root_h.T @ W @ root_g)
    tail = float(spectrum[rank:].square().sum().sqrt())
    assert abs(float(left.norm()) - tail) <= 1e-7 * float(spectrum[0])


def test_a_target_is_approximated_in_place_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    W, target = torch.randn(2, 8, 6, generator=generator)
    pair = solve(Problem(W=W, rank=3, target=target.double()))
    torch.testing.assert_close(pair.dense(), low_rank(target, 3).dense())
    assert pair.A.dtype == pair.B.dtype == W.dtype
    assert gram_norm(target - pair.dense()) < gram_norm(target - low_rank(W, 3).dense())


def optimal_error(W: torch.Tensor, rank: int, gram: torch.Tensor | None) -> tuple[float, float]:
    """Tail of the singular values of ``W G^{1/2}``, and the largest of them."""
    root = torch.ones(W.shape[1], dtype=W.dtype) if gram is None else gram_sqrt(gram)
    values = torch.linalg.svdvals(W * root if root.ndim == 1 else W @ root)
    return float(torch.linalg.vector_norm(values[rank:])), float(values[0])


@given(st.data(), matrices_and_ranks())
def test_low_rank_is_optimal(data, case):
    W, rank = case
    gram = data.draw(st.none() | grams(W.shape[1]))
    best, scale = optimal_error(W, rank, gram)
    for form in (low_rank(W, rank, gram, exact=True), interpolative(W, rank, gram)):
        error = gram_norm(form.dense() - W, gram)
        assert best - HALF * scale <= error <= best * (1 + 1e-6) + HALF * scale


@given(SEEDS, st.sampled_from([None, *GRAMS]), st.sampled_from([(160, 120), (120, 160), (300, 90)]))
def test_subspace_iteration_is_optimal_within_a_percent(seed, make, shape):
    generator = seeded(seed)
    W = gaussian(*shape, generator)
    gram = make and make(shape[1], generator)
    best, _ = optimal_error(W, 20, gram)
    assert gram_norm(low_rank(W, 20, gram, exact=False).dense() - W, gram) <= 1.01 * best


@given(SEEDS, SHAPES, st.booleans(), st.data())
def test_low_rank_is_optimal_in_both_metrics(seed, shape, diagonal, data):
    W, gram, outputs, _ = weight_and_metrics(seed, shape)
    rank = data.draw(st.integers(1, min(shape)))
    metric = outputs.diagonal() if diagonal else outputs
    full = torch.diag(metric) if diagonal else metric
    found = low_rank(W, rank, gram, outputs=metric).dense()
    values = torch.linalg.svdvals(gram_sqrt(full) @ W @ gram_sqrt(gram))
    best = float(values[rank:].square().sum())
    assert metric_loss(W, found, gram, full) <= best + 1e-7 * float(values[0]) ** 2


def test_bad_metrics_are_refused():
    W = gaussian(4, 5, seeded(0))
    with pytest.raises(ValueError, match=r"shape \(5, 5\); expected \(4, 4\)"):
        low_rank(W, 2, outputs=torch.eye(5))
    with pytest.raises(ValueError, match="not positive definite"):
        low_rank(W, 2, outputs=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="not positive definite"):
        low_rank(W, 2, outputs=torch.tensor([1.0, 0.0, 1.0, 1.0]))
