"""What every factorization promises, in the norm that the activations give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    Selection,
    cur,
    deim,
    gram_norm,
    gram_sqrt,
    interpolative,
    low_rank,
    row_id_of_pair,
    select_rows_and_columns,
)

from .strategies import (
    DTYPES,
    GRAMS,
    MAKERS,
    REGULAR,
    SEEDS,
    full_gram,
    gaussian,
    grams,
    hilbert,
    matrices,
    matrices_and_ranks,
    seeded,
)

# Half the digits: what is left of a quantity that was squared on the way (eigenvalues of W G Wᵀ),
# or that a core U with entries up to 1/√eps multiplies.
HALF = 1e-7


def optimal_error(W: torch.Tensor, rank: int, gram: torch.Tensor | None) -> tuple[float, float]:
    """Tail of the singular values of ``W G^{1/2}``, and the largest of them."""
    root = torch.ones(W.shape[1], dtype=W.dtype) if gram is None else gram_sqrt(gram)
    values = torch.linalg.svdvals(W * root if root.ndim == 1 else W @ root)
    return float(torch.linalg.vector_norm(values[rank:])), float(values[0])


def pick(length: int, count: int, seed: int) -> torch.Tensor:
    return torch.randperm(length, generator=seeded(seed))[:count]


# Exact recovery


@given(matrices(max_side=16))
def test_full_rank_recovers_the_matrix(W):
    m, n = W.shape
    rank = min(m, n)
    scale = float(torch.linalg.matrix_norm(W, 2))
    rows, columns = select_rows_and_columns(Selection.DEIM, W, rank)
    factored = {
        "low_rank": low_rank(W, rank),
        "low_rank, iterated": low_rank(W, rank, exact=False),
        "compact": row_id_of_pair(low_rank(W, rank)),
        "interpolative": interpolative(W, rank),
        "interpolative, real rows": interpolative(W, rank, rows=rows),
        "cur": cur(W, rows, columns),
    }
    for name, form in factored.items():
        assert form.rank == rank
        assert float((form.dense() - W).norm()) <= HALF * scale, name


@given(SEEDS, st.integers(1, 6), st.integers(6, 20), st.integers(6, 20))
def test_the_true_rank_suffices(seed, rank, m, n):
    generator = seeded(seed)
    W = gaussian(m, rank, generator) @ gaussian(rank, n, generator)
    gram = full_gram(n, generator)
    rows, columns = select_rows_and_columns(Selection.DEIM, W, rank)
    for form in (
        low_rank(W, rank, gram),
        interpolative(W, rank, gram),
        interpolative(W, rank, gram, rows=rows),
        cur(W, rows, columns, gram),
    ):
        torch.testing.assert_close(form.dense(), W, rtol=1e-5, atol=1e-5)


# Real rows and columns


@given(st.data(), matrices_and_ranks(), DTYPES, SEEDS)
def test_chosen_rows_and_columns_are_stored_bit_for_bit(data, case, dtype, seed):
    W, rank = case
    gram = data.draw(st.none() | grams(W.shape[1]))
    W = W.to(dtype)
    rows, columns = pick(W.shape[0], rank, seed), pick(W.shape[1], rank, seed + 1)
    factored = cur(W, rows, columns, gram)
    assert torch.equal(factored.C.to(dtype), W[:, columns])
    assert torch.equal(factored.R.to(dtype), W[rows])
    row_id = interpolative(W, rank, gram, rows=rows)
    assert torch.equal(row_id.S.to(dtype), W[rows])
    assert torch.equal(row_id.rows, rows)
    assert torch.equal(row_id.dense()[rows].to(dtype), W[rows])


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


# Optimality


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


@given(st.data(), matrices_and_ranks(), SEEDS)
def test_freedom_never_hurts(data, case, seed):
    """Free rows beat real rows beat real rows and columns, at the same rank."""
    W, rank = case
    gram = data.draw(st.none() | grams(W.shape[1]))
    rows, columns = pick(W.shape[0], rank, seed), pick(W.shape[1], rank, seed + 1)
    free, real, both = (
        gram_norm(form.dense() - W, gram)
        for form in (
            interpolative(W, rank, gram),
            interpolative(W, rank, gram, rows=rows),
            cur(W, rows, columns, gram),
        )
    )
    diagonal = torch.ones(1) if gram is None else gram if gram.ndim == 1 else gram.diagonal()
    slack = 4e-4 * float(diagonal.max()) ** 0.5 * float(torch.linalg.matrix_norm(W, 2))
    assert free <= real + slack
    assert real <= both + slack


# The compact form


@st.composite
def pairs(draw):
    A, rank = draw(matrices_and_ranks(tall=True))
    seed = draw(SEEDS)
    return type(low_rank(A, 1))(
        A=A[:, :rank], B=gaussian(rank, draw(st.integers(1, 12)), seeded(seed))
    )


@given(pairs(), st.sampled_from([1.01, 1.5, 2.0, 10.0]))
def test_compact_is_the_pair_with_bounded_entries(pair, max_entry):
    row_id = row_id_of_pair(pair, max_entry=max_entry)
    m, rank = pair.A.shape
    assert row_id.S.shape == (rank, pair.B.shape[1])
    assert row_id.T.shape == (m - rank, rank)
    assert torch.equal(row_id.order.sort().values, torch.arange(m))
    scale = float(pair.A.norm() * pair.B.norm())
    torch.testing.assert_close(row_id.dense(), pair.dense(), rtol=0, atol=1e-12 * scale)
    assert row_id.T.numel() == 0 or float(row_id.T.abs().max()) <= max_entry * (1 + 1e-9)


@given(pairs())
def test_the_skeleton_is_what_its_rows_give(pair):
    row_id = row_id_of_pair(pair)
    assert row_id.rows.unique().numel() == row_id.rank
    assert torch.equal(row_id.dense()[row_id.rows], row_id.S)
    expected = pair.dense()[row_id.rows]
    torch.testing.assert_close(row_id.S, expected, rtol=1e-10, atol=1e-12 * float(pair.A.norm()))


# Hilbert matrices


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


# Types and refusals


@given(st.data(), matrices_and_ranks(), DTYPES, SEEDS)
def test_factors_have_the_weight_s_precision_and_inputs_stay(data, case, dtype, seed):
    W, rank = case
    gram = data.draw(st.none() | grams(W.shape[1]))
    W, before, gram_before = (
        W.to(dtype),
        W.to(dtype).clone(),
        gram if gram is None else gram.clone(),
    )
    rows, columns = pick(W.shape[0], rank, seed), pick(W.shape[1], rank, seed + 1)
    rows_before = rows.clone()
    wide = torch.promote_types(dtype, torch.float32)
    pair = low_rank(W, rank, gram)
    left_before = pair.A.clone()
    for form in (
        pair,
        row_id_of_pair(pair),
        interpolative(W, rank, gram, rows=rows),
        cur(W, rows, columns, gram),
    ):
        assert form.dense().dtype == wide
        assert torch.isfinite(form.dense()).all()
    assert torch.equal(W, before)
    assert torch.equal(rows, rows_before)
    assert torch.equal(pair.A, left_before)
    assert gram is None or torch.equal(gram, gram_before)


FITS = {
    "cur": lambda W, gram=None: cur(W, torch.arange(2), torch.arange(2), gram),
    "low_rank": lambda W, gram=None: low_rank(W, 2, gram),
    "interpolative": lambda W, gram=None: interpolative(W, 2, gram),
    "real rows": lambda W, gram=None: interpolative(W, 2, gram, rows=torch.arange(2)),
}


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_a_bad_weight_or_gram_matrix_is_named(fit):
    W = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"weight.*NaN.*12 of 12.*Repair"):
        fit(W * torch.nan)
    with pytest.raises(ValueError, match=r"weight.*NaN or infinity"):
        fit(W * torch.inf)
    with pytest.raises(ValueError, match=r"weight has shape \(4,\)"):
        fit(W[:, 0])
    with pytest.raises(ValueError, match=r"weight has dtype torch\.int32.*float"):
        fit(W.int())
    with pytest.raises(ValueError, match=r"Gram matrix.*NaN"):
        fit(W, torch.full((3, 3), torch.nan))
    with pytest.raises(ValueError, match=r"Gram matrix.*\(4, 4\).*3"):
        fit(W, torch.eye(4))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_out_of_range_is_named(rank):
    W = torch.ones(5, 3)
    for fit in (
        lambda: low_rank(W, rank),
        lambda: interpolative(W, rank),
        lambda: interpolative(W, rank, rows=torch.arange(rank)),
    ):
        with pytest.raises(ValueError, match=rf"rank {rank} is outside 1\.\.3 for a 5x3 matrix"):
            fit()


def test_bad_indices_are_named():
    W = torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"\(2,\) rows.*\(3,\) columns.*equally many"):
        cur(W, torch.arange(2), torch.arange(3))
    with pytest.raises(ValueError, match=r"rows.*5.*0\.\.4"):
        cur(W, torch.tensor([0, 5]), torch.arange(2))
    with pytest.raises(ValueError, match=r"columns.*-1.*0\.\.3"):
        cur(W, torch.arange(2), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="2 distinct"):
        interpolative(W, 2, rows=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"rows.*7.*0\.\.4"):
        interpolative(W, 2, rows=torch.tensor([1, 7]))


def test_a_bad_pair_is_named():
    pair = low_rank(torch.ones(5, 4), 2)
    make = type(pair)
    with pytest.raises(ValueError, match=r"left factor.*NaN"):
        row_id_of_pair(make(pair.A * torch.nan, pair.B))
    with pytest.raises(ValueError, match=r"right factor.*NaN"):
        row_id_of_pair(make(pair.A, pair.B * torch.nan))
    with pytest.raises(ValueError, match=r"max_entry is 1.*above 1"):
        row_id_of_pair(pair, max_entry=1)
    with pytest.raises(ValueError, match=r"left factor has shape \(2, 5\).*as many rows"):
        row_id_of_pair(make(pair.A.T, pair.A))
