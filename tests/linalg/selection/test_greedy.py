"""Rows chosen one after another, against the textbook and by what they leave."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    Score,
    Selection,
    cur,
    gram_sqrt,
    greedy,
    score,
    select_rows_and_columns,
)

from ..strategies import SEEDS, seeded


def left_over(A: torch.Tensor, rows: list[int], metric: torch.Tensor | None) -> float:
    """``min_X ‖M^{1/2} (A − X A[I])‖_F²``, by least squares."""
    E = A
    if rows:
        basis = torch.linalg.svd(A[rows], full_matrices=False)
        kept = 1e-10 * float(basis.S[0]) < basis.S
        Q = basis.Vh[kept]
        E = A - A @ Q.mT @ Q
    if metric is None:
        return float(E.square().sum())
    M = torch.diag(metric) if metric.ndim == 1 else metric
    return float((M @ E * E).sum())


@st.composite
def problems(draw):
    """A matrix of any rank, and a metric in one of its three forms."""
    generator = seeded(draw(SEEDS))
    m, n = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    inner = draw(st.integers(1, max(m, n)))
    normal = {"generator": generator, "dtype": torch.float64}
    A = torch.randn(m, inner, **normal) @ torch.randn(inner, n, **normal)
    A = A * torch.randn(m, 1, **normal).exp()
    root = torch.randn(m, m, **normal)
    metric = draw(st.sampled_from([None, "diagonal", "full"]))
    if metric is not None:
        metric = root @ root.mT if metric == "full" else root.square().sum(1)
    return A, metric


@given(problems(), st.data())
def test_every_row_is_the_best_to_add(problem, data):
    A, metric = problem
    count = data.draw(st.integers(1, len(A)))
    chosen = greedy(A, count, metric).tolist()
    assert len(set(chosen)) == count and set(chosen) <= set(range(len(A)))
    whole = left_over(A, [], metric)
    for step in range(count):
        found = left_over(A, chosen[: step + 1], metric)
        best = min(left_over(A, [*chosen[:step], i], metric) for i in range(len(A)))
        assert found <= best + 1e-8 * whole


@given(problems())
def test_no_row_is_chosen_twice_and_the_rank_is_enough(problem):
    A, metric = problem
    rank = int(torch.linalg.matrix_rank(A))
    chosen = greedy(A, len(A), metric).tolist()
    assert sorted(chosen) == list(range(len(A)))
    assert left_over(A, chosen[:rank], metric) <= 1e-8 * left_over(A, [], metric)


def test_many_steps_stay_exact():
    # Beyond the 256 after which gains are computed anew, with one massive column.
    A = torch.randn(320, 290, generator=seeded(0), dtype=torch.float64)
    A[:, 7] *= 1e5
    chosen = greedy(A, 264).tolist()
    for step in (1, 128, 255, 256, 257, 263):
        found = left_over(A, chosen[: step + 1], None)
        best = min(left_over(A, [*chosen[:step], i], None) for i in range(0, 320, 19))
        assert found <= best * (1 + 1e-9)


@given(SEEDS)
def test_cur_is_closer_than_with_deim(seed):
    generator = seeded(seed)
    m, n, rank = 48, 40, 12
    decay = torch.arange(1, n + 1) ** -0.7
    W = torch.randn(m, n, generator=generator) * decay
    x = torch.randn(4 * n, n, generator=generator) * torch.randn(n, generator=generator).exp()
    g = torch.randn(4 * m, m, generator=generator) * torch.randn(m, generator=generator).exp()
    G, H = (x.mT @ x / len(x)).double(), (g.mT @ g / len(g)).double()

    def error(kind, scored):
        chosen = select_rows_and_columns(kind, scored, rank, gram=G, outputs=H)
        missed = W - cur(W, *chosen, G, outputs=H).dense()
        return float(torch.linalg.norm(gram_sqrt(H) @ missed.double() @ gram_sqrt(G)))

    assume(float(torch.linalg.cond(G)) < 1e8)
    assert error(Selection.GREEDY, W) < 1.02 * error(Selection.DEIM, score(Score.WANDA, W, G))


def test_bad_input_is_refused():
    A = torch.eye(3)
    with pytest.raises(ValueError, match=r"metric of the rows has shape \(2, 2\); expected"):
        greedy(A, 1, torch.eye(2))
    with pytest.raises(ValueError, match="the matrix"):
        greedy(A * torch.nan, 1)
    with pytest.raises(ValueError, match="the metric of the rows"):
        greedy(A, 1, torch.tensor([1.0, torch.inf, 1.0]))
    with pytest.raises(ValueError, match="a matrix of 3 rows"):
        greedy(A, 4)
