"""Plain pairs: optimal under both metrics, and what a problem asks for."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import LowRank, Problem, gram_norm, low_rank
from cur_modifier.linalg.low_rank import solve


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
