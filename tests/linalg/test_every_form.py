"""What every decomposition promises, in the norm that the activations give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    Selection,
    cur,
    gram_norm,
    interpolative,
    low_rank,
    row_id_of_pair,
    select_rows_and_columns,
)

from .strategies import (
    DTYPES,
    SEEDS,
    full_gram,
    gaussian,
    grams,
    matrices,
    matrices_and_ranks,
    pick,
    seeded,
)

# Half the digits: what is left of a quantity that was squared on the way (eigenvalues of W G Wᵀ),
# or that a core U with entries up to 1/√eps multiplies.
HALF = 1e-7


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
