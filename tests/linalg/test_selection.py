import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    Selection,
    cur,
    deim,
    leverage_sampled,
    leverage_scores,
    leverage_top,
    norm,
    qdeim,
    random,
    select_rows,
    select_rows_and_columns,
)

from .strategies import (
    DTYPES,
    SEEDS,
    gaussian,
    hilbert,
    matrices,
    matrices_and_ranks,
    orthonormal,
    seeded,
)

ON_A_BASIS = {
    "deim": deim,
    "qdeim": qdeim,
    "leverage_top": leverage_top,
    "leverage_sampled": lambda V: leverage_sampled(V, seeded(0)),
}


@st.composite
def bases(draw):
    m = draw(st.integers(1, 30))
    return orthonormal(m, draw(st.integers(1, m)), seeded(draw(SEEDS)))


def textbook_deim(V: torch.Tensor) -> list[int]:
    """Chaturantabut and Sorensen 2010, algorithm 1, word by word."""
    chosen = [int(V[:, 0].abs().argmax())]
    for j in range(1, V.shape[1]):
        coefficients = torch.linalg.solve(V[chosen, :j], V[chosen, j])
        residual = V[:, j] - V[:, :j] @ coefficients
        chosen.append(int(residual.abs().argmax()))
    return chosen


def assert_selection(indices: torch.Tensor, count: int, length: int) -> None:
    assert indices.dtype == torch.int64
    assert indices.shape == (count,)
    assert indices.unique().numel() == count
    assert indices.min() >= 0
    assert indices.max() < length


@given(bases())
def test_deim_is_the_textbook_loop(V):
    assert deim(V).tolist() == textbook_deim(V)


@pytest.mark.parametrize("n", [5, 10, 15])
def test_deim_is_the_textbook_loop_on_a_hilbert_matrix(n):
    U, _, Vh = torch.linalg.svd(hilbert(2 * n, n), full_matrices=False)
    for basis in (U[:, : n // 2], Vh[: n // 2].T):
        assert deim(basis).tolist() == textbook_deim(basis)


@given(bases())
def test_qdeim_depends_on_the_subspace_alone(V):
    r = V.shape[1]
    rotated = V @ orthonormal(r, r, seeded(1))
    assert qdeim(V).unique().equal(qdeim(rotated).unique())


@given(bases())
def test_deim_and_qdeim_keep_the_chosen_block_invertible(V):
    m, r = V.shape
    for select in (deim, qdeim):
        amplification = 1 / float(torch.linalg.svdvals(V[select(V)])[-1])
        # The proven bounds: √(mr/3)·2^r (DEIM), √(m−r+1)·√(4^r+6r−1)/3 (Q-DEIM).
        assert amplification <= max(1, (m * r) ** 0.5) * 2.0**r


@given(bases())
def test_leverage_scores_sum_to_the_rank(V):
    scores = leverage_scores(V)
    assert float(scores.sum()) == pytest.approx(V.shape[1])
    assert (scores >= 0).all()
    assert (scores <= 1 + 1e-12).all()


@given(bases())
def test_leverage_top_are_the_largest(V):
    scores, chosen = leverage_scores(V), leverage_top(V)
    unchosen = torch.ones(V.shape[0], dtype=torch.bool).index_fill(0, chosen, False)
    assert unchosen.sum() == 0 or scores[chosen].min() >= scores[unchosen].max()


def test_leverage_sampling_follows_the_scores():
    V = torch.tensor([[0.8], [0.6], [0.0]])
    generator = seeded(0)
    draws = torch.cat([leverage_sampled(V, generator) for _ in range(4000)])
    shares = draws.bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, V[:, 0] ** 2, rtol=0, atol=0.03)


@given(matrices_and_ranks())
def test_norm_takes_the_longest_rows(case):
    A, count = case
    lengths = A.norm(dim=1)
    expected = sorted(range(A.shape[0]), key=lambda i: (-float(lengths[i]), i))[:count]
    assert norm(A, count).tolist() == expected


@given(st.integers(1, 50), st.data(), SEEDS)
def test_random_is_a_seeded_choice(length, data, seed):
    count = data.draw(st.integers(1, length))
    chosen = random(length, count, seeded(seed))
    assert_selection(chosen, count, length)
    assert torch.equal(chosen, random(length, count, seeded(seed)))


@given(bases(), st.sampled_from(sorted(ON_A_BASIS)), DTYPES)
def test_selections_on_a_basis_are_distinct_and_in_range(V, name, dtype):
    V = V.to(dtype)
    before = V.clone()
    assert_selection(ON_A_BASIS[name](V), V.shape[1], V.shape[0])
    assert torch.equal(V, before)


@given(st.sampled_from(Selection), matrices_and_ranks(), DTYPES, SEEDS)
def test_rows_and_columns_are_distinct_in_range_and_repeatable(kind, case, dtype, seed):
    A, rank = case
    A = A.to(dtype)
    before = A.clone()
    rows, columns = select_rows_and_columns(kind, A, rank, seed=seed)
    assert_selection(rows, rank, A.shape[0])
    assert_selection(columns, rank, A.shape[1])
    again = select_rows_and_columns(kind, A, rank, seed=seed)
    assert torch.equal(rows, again[0])
    assert torch.equal(columns, again[1])
    assert torch.equal(rows, select_rows(kind, A, rank, seed=seed))
    assert torch.equal(A, before)


@pytest.mark.parametrize("kind", [Selection.DEIM, Selection.QDEIM])
@given(SEEDS)
def test_deim_never_takes_a_copy_while_something_new_is_left(kind, seed):
    distinct = gaussian(6, 5, seeded(seed))
    A = torch.cat([distinct, distinct])[:, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    rows, columns = select_rows_and_columns(kind, A, 5)
    assert (rows % 6).unique().numel() == 5
    assert (columns % 5).unique().numel() == 5


@pytest.mark.parametrize("kind", Selection)
def test_a_long_matrix_selects_alike_for_a_seed(kind):
    A = gaussian(1500, 1450, seeded(0)).float()  # large enough to be sketched
    first, second = (select_rows_and_columns(kind, A, 20, seed=7) for _ in range(2))
    for indices, again, side in zip(first, second, A.shape, strict=True):
        assert_selection(indices, 20, side)
        assert torch.equal(indices, again)


@pytest.mark.parametrize("kind", [Selection.DEIM, Selection.QDEIM])
def test_a_sketched_selection_finds_the_rank(kind):
    generator = seeded(0)
    A = gaussian(1500, 20, generator) @ gaussian(20, 1450, generator)
    rows, columns = select_rows_and_columns(kind, A, 20)
    torch.testing.assert_close(cur(A, rows, columns).dense(), A)


@pytest.mark.parametrize("kind", Selection)
def test_bad_input_is_named(kind):
    A = torch.ones(4, 3)
    A[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"scored matrix.*NaN.*1 of 12"):
        select_rows_and_columns(kind, A, 2)
    with pytest.raises(ValueError, match=r"scored matrix.*NaN.*1 of 12"):
        select_rows(kind, A, 2)
    with pytest.raises(ValueError, match="scored matrix has shape"):
        select_rows_and_columns(kind, torch.ones(4), 2)
    for rank in (0, 4):
        with pytest.raises(ValueError, match=rf"rank {rank} is outside 1\.\.3 for a 4x3 matrix"):
            select_rows_and_columns(kind, torch.ones(4, 3), rank)


@pytest.mark.parametrize("name", [*ON_A_BASIS, "leverage_scores"])
def test_a_bad_basis_is_named(name):
    select = {**ON_A_BASIS, "leverage_scores": leverage_scores}[name]
    with pytest.raises(ValueError, match=r"basis.*NaN"):
        select(torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match=r"basis has shape \(2, 4\).*as many rows as columns"):
        select(torch.ones(2, 4))


@given(matrices())
def test_counts_out_of_range_are_refused(A):
    length = A.shape[0]
    for count in (0, length + 1):
        with pytest.raises(ValueError, match=rf"rank {count} is outside 1\.\.{length}"):
            norm(A, count)
        with pytest.raises(ValueError, match=rf"rank {count} is outside 1\.\.{length}"):
            random(length, count, seeded(0))
