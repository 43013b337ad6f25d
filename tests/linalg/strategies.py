"""What the property tests draw: matrices of every awkward kind, and second moments to go with them.

Hypothesis draws the kind, the shape and the seed; torch draws the numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st

from cur_modifier.linalg import LowRank, damped

SEEDS = st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def orthonormal(m: int, r: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(gaussian(m, r, generator)).Q


def with_spectrum(
    m: int, n: int, spectrum: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """An ``(m, n)`` matrix with these singular values and random singular vectors."""
    k = spectrum.numel()
    return orthonormal(m, k, generator) * spectrum @ orthonormal(n, k, generator).T


def decaying(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    return with_spectrum(m, n, torch.arange(1, min(m, n) + 1).double() ** -1.5, generator)


def rank_deficient(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    inner = max(1, min(m, n) // 2)
    return gaussian(m, inner, generator) @ gaussian(inner, n, generator)


def duplicated(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Every row and every column occurs twice or more, unless there is only one."""
    rows, columns = torch.arange(m) % max(1, m // 2), torch.arange(n) % max(1, n // 2)
    return gaussian(m, n, generator)[rows][:, columns]


def badly_scaled(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Rows and columns whose norms span eight orders of magnitude, as outlier features do."""
    rows, columns = (10.0 ** (8 * torch.rand(k, generator=generator).double() - 4) for k in (m, n))
    return rows[:, None] * gaussian(m, n, generator) * columns


def hilbert(m: int, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
    return 1 / (torch.arange(m)[:, None] + torch.arange(n) + 1).double()


def zero(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(m, n, dtype=torch.float64)


Maker = Callable[[int, int, torch.Generator], torch.Tensor]
REGULAR: list[Maker] = [gaussian, decaying]
AWKWARD: list[Maker] = [rank_deficient, duplicated, badly_scaled, hilbert, zero]
MAKERS = REGULAR + AWKWARD


@st.composite
def matrices(draw, makers=tuple(MAKERS), max_side: int = 24, tall: bool = False):
    """A float64 matrix: square, tall, wide, a single row or a single column."""
    m, n = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    if tall:
        m, n = max(m, n), min(m, n)
    return draw(st.sampled_from(makers))(m, n, seeded(draw(SEEDS)))


@st.composite
def matrices_and_ranks(draw, **kwargs):
    W = draw(matrices(**kwargs))
    return W, draw(st.integers(1, min(W.shape)))


def full_gram(n: int, generator: torch.Generator) -> torch.Tensor:
    x = gaussian(2 * n, n, generator)
    return x.T @ x / (2 * n)


def singular_gram(n: int, generator: torch.Generator) -> torch.Tensor:
    x = gaussian(max(1, n // 2), n, generator)
    return x.T @ x


def diagonal_gram(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=generator, dtype=torch.float64).exp()


GRAMS = (full_gram, singular_gram, diagonal_gram)


def grams(n: int, makers=GRAMS):
    return st.builds(lambda make, seed: make(n, seeded(seed)), st.sampled_from(makers), SEEDS)


@st.composite
def bases(draw):
    """An orthonormal ``(m, r)``."""
    m = draw(st.integers(1, 30))
    return orthonormal(m, draw(st.integers(1, m)), seeded(draw(SEEDS)))


def pick(length: int, count: int, seed: int) -> torch.Tensor:
    """Distinct indices, drawn by ``seed``."""
    return torch.randperm(length, generator=seeded(seed))[:count]


def pair_of(m: int, n: int, rank: int, seed: int = 0) -> LowRank:
    """A random pair of full rank."""
    generator = seeded(seed)
    return LowRank(A=gaussian(m, rank, generator), B=gaussian(rank, n, generator))


SHAPES = st.tuples(st.integers(2, 14), st.integers(2, 14))


def weight_and_metrics(seed: int, shape: tuple[int, int]):
    """A weight, ``G``, ``H``, and the generator that drew them."""
    m, n = shape
    generator = seeded(seed)
    W = gaussian(m, n, generator)
    return W, full_gram(n, generator), damped(full_gram(m, generator), 0.1), generator


def metric_loss(W, other, gram, outputs) -> float:
    """``‖H^{1/2} (W − Ŵ) G^{1/2}‖²``."""
    error = W - other
    return float(torch.einsum("ij,ik,kl,jl->", error, outputs, error, gram))


def assert_selection(indices: torch.Tensor, count: int, length: int) -> None:
    """``count`` distinct indices below ``length``."""
    assert indices.dtype == torch.int64
    assert indices.shape == (count,)
    assert indices.unique().numel() == count
    assert indices.min() >= 0
    assert indices.max() < length
