"""CUR: real rows and columns, and the best core between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    Selection,
    cur,
    deim,
    gram_norm,
    interpolative,
    select_rows_and_columns,
)

from .strategies import (
    DTYPES,
    MAKERS,
    REGULAR,
    SEEDS,
    SHAPES,
    full_gram,
    gaussian,
    grams,
    hilbert,
    matrices_and_ranks,
    metric_loss,
    pick,
    seeded,
    weight_and_metrics,
)

# Half the digits: what is left of a quantity that was squared on the way (eigenvalues of W G Wᵀ),
# or that a core U with entries up to 1/√eps multiplies.
HALF = 1e-7


@given(st.data(), matrices_and_ranks(), DTYPES, SEEDS)
def test_chosen_rows_and_columns_are_stored_bit_for_bit(data, case, dtype, seed):
    W, rank = case
    gram = data.draw(st.none() | grams(W.shape[1]))
    W = W.to(dtype)
    rows, columns = pick(W.shape[0], rank, seed), pick(W.shape[1], rank, seed + 1)
    factored = cur(W, rows, columns, gram)
    assert torch.equal(factored.C.to(dtype), W[:, columns])
    assert torch.equal(factored.R.to(dtype), W[rows])


@given(matrices_and_ranks(max_side=20))
def test_deim_cur_obeys_its_bound(case):
    """Sorensen and Embree 2016, theorem 4.1: ‖W − CUR‖₂ ≤ (η_p + η_q) σ_{r+1}."""
    W, rank = case
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    rows, columns = deim(U[:, :rank]), deim(Vh[:rank].T)
    eta = sum(
        1 / float(torch.linalg.svdvals(block)[-1])
        for block in (U[rows, :rank], Vh[:rank].T[columns])
    )
    tail = float(s[rank]) if rank < s.numel() else 0.0
    error = float(torch.linalg.matrix_norm(cur(W, rows, columns).dense() - W, 2))
    assert error <= eta * tail + HALF * float(s[0])


@given(st.data(), matrices_and_ranks(makers=[m for m in MAKERS if m is not hilbert]), SEEDS)
def test_the_core_for_the_activations_is_never_worse_for_them(data, case, seed):
    """Random rows of a Hilbert matrix are dependent to working precision, and then both cores are
    rounding; :func:`test_hilbert_matrices_compress_to_their_numerical_rank` has it on DEIM's rows.
    """
    W, rank = case
    gram = data.draw(grams(W.shape[1]))
    rows, columns = pick(W.shape[0], rank, seed), pick(W.shape[1], rank, seed + 1)
    plain = cur(W, rows, columns).dense() - W
    fitted = cur(W, rows, columns, gram).dense() - W
    # The fit minimises the norm of G plus a trace of identity, so there the promise is exact.
    diagonal = gram if gram.ndim == 1 else gram.diagonal()
    trace = float(torch.finfo(torch.float32).eps * diagonal.mean()) ** 0.5
    slack = HALF * gram_norm(W, gram) + trace * float(plain.norm())
    assert gram_norm(fitted, gram) <= gram_norm(plain, gram) + slack


@given(SEEDS)
def test_the_core_for_the_activations_is_stationary(seed):
    generator = seeded(seed)
    W, gram = gaussian(12, 10, generator), full_gram(10, generator)
    form = cur(W, pick(12, 4, seed), pick(10, 4, seed), gram)
    gradient = form.C.T @ (W - form.dense()) @ gram @ form.R.T
    assert float(gradient.abs().max()) <= 1e-4 * float((form.C.T @ W @ gram @ form.R.T).abs().max())


@given(matrices_and_ranks(makers=REGULAR), SEEDS)
def test_repeated_rows_and_columns_only_waste_rank(case, seed):
    W, rank = case
    rows, columns = pick(W.shape[0], rank, seed), pick(W.shape[1], rank, seed)
    once = cur(W, rows, columns).dense()
    twice = cur(W, rows.repeat(2), columns.repeat(2)).dense()
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=1e-6)


@given(SEEDS, SHAPES, st.data())
def test_the_core_is_optimal_in_both_metrics(seed, shape, data):
    W, gram, outputs, generator = weight_and_metrics(seed, shape)
    rank = data.draw(st.integers(1, min(shape)))
    rows, columns = (torch.randperm(s, generator=generator)[:rank] for s in shape)
    target = W + 0.1 * gaussian(*shape, generator)
    found = cur(W, rows, columns, gram, outputs=outputs, target=target)
    assert torch.equal(found.C, W[:, columns]) and torch.equal(found.R, W[rows])
    before = metric_loss(target, found.dense(), gram, outputs)
    step = 1e-3 * gaussian(rank, rank, generator)
    moved = metric_loss(target, found.C @ (found.U + step) @ found.R, gram, outputs)
    scale = metric_loss(target, torch.zeros_like(W), gram, outputs)
    assert before <= moved + 1e-6 * scale


@pytest.mark.parametrize("n", [8, 16, 32])
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_hilbert_matrices_compress_to_their_numerical_rank(n, rank):
    W, gram = hilbert(n, n), full_gram(n, seeded(0))
    sigma = torch.linalg.svdvals(W)
    rows, columns = select_rows_and_columns(Selection.DEIM, W, rank)
    plain, fitted = cur(W, rows, columns), cur(W, rows, columns, gram)
    assert gram_norm(fitted.dense() - W, gram) <= gram_norm(plain.dense() - W, gram) + HALF
    for form in (interpolative(W, rank), interpolative(W, rank, rows=rows), plain):
        error = float(torch.linalg.matrix_norm(form.dense() - W, 2))
        assert float(sigma[rank]) * (1 - 1e-6) <= error <= 10 * float(sigma[rank])


@pytest.mark.parametrize("rank", [8, 12, 20])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_a_cur_beyond_the_numerical_rank_does_not_blow_up(rank, dtype, digits):
    W = hilbert(20, 20).to(dtype)
    rows, columns = select_rows_and_columns(Selection.DEIM, W, rank)
    assert float((cur(W, rows, columns).dense() - W).norm()) <= digits


def test_bad_indices_are_named():
    W = torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"\(2,\) rows.*\(3,\) columns.*equally many"):
        cur(W, torch.arange(2), torch.arange(3))
    with pytest.raises(ValueError, match=r"rows.*5.*0\.\.4"):
        cur(W, torch.tensor([0, 5]), torch.arange(2))
    with pytest.raises(ValueError, match=r"columns.*-1.*0\.\.3"):
        cur(W, torch.arange(2), torch.tensor([0, -1]))
