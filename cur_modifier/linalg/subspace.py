"""Leading singular subspaces, exact or sketched."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cur_modifier.linalg.checks import (
    at_least_float32,
    require_finite,
    require_matrix,
    require_rank,
)

__all__ = [
    "Subspace",
    "is_small",
    "leading_subspace",
    "lstsq",
    "singular_values",
    "sketched_row_basis",
]

# Up to this many entries (1024 x 2048) exact triplets take less than half a second, and a sketch
# saves nothing worth its error.
EXACT_ENTRIES = 2**21


class Subspace(NamedTuple):
    """``A ≈ U diag(s) Vᵀ``: ``U (m, r)`` and ``V (n, r)`` orthonormal, ``s (r,)`` descending."""

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor


def is_small(m: int, n: int, rank: int) -> bool:
    """Whether a sketch of rank ``r`` would save little over the exact triplets of ``(m, n)``."""
    return m * n <= EXACT_ENTRIES or 4 * rank > min(m, n)


def leading_subspace(
    A: torch.Tensor,
    rank: int,
    *,
    generator: torch.Generator | None = None,
    oversample: int = 16,
    power_iterations: int = 0,
    exact: bool | None = None,
) -> Subspace:
    """The ``rank`` leading singular triplets of ``A (m, n)``.

    Exact where the matrix has at most 2²¹ entries or the rank is more than a quarter of its short
    side; otherwise by a Gaussian sketch with ``oversample`` extra columns. Selection needs only
    that the subspace carries most of the energy, so no power iteration is made by default; give
    one or two where the spectrum decays slowly and the triplets themselves matter.

    Args:
        generator: seeds the sketch (a CPU generator; the default one is seeded with 0).
        exact: force the exact triplets (True) or the sketch (False).

    Cost: ``O(m n min(m, n))`` exact; ``(4 + 4q) m n (r + oversample)`` flops sketched with ``q``
    power iterations.

    Source: Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1.

    Raises:
        ValueError: ``A`` is not a finite matrix, or the rank is outside ``1..min(m, n)``.
    """
    require_matrix(A, "the matrix")
    require_finite(A, "the matrix")
    A = at_least_float32(A)
    m, n = A.shape
    require_rank(rank, min(m, n), f"a {m}x{n} matrix")
    if exact is None:
        exact = is_small(m, n, rank)
    if exact:
        return _exact_triplets(A, rank)
    if m < n:
        flipped = leading_subspace(
            A.mT,
            rank,
            generator=generator,
            oversample=oversample,
            power_iterations=power_iterations,
            exact=False,
        )
        return Subspace(flipped.V, flipped.s, flipped.U)

    if generator is None:
        generator = torch.Generator().manual_seed(0)
    width = min(rank + oversample, n)
    # Sketch from the side that makes the orthogonalized block the short one.
    sketch = torch.randn(width, m, generator=generator, dtype=torch.float32).to(A)
    basis = torch.linalg.qr((sketch @ A).mT).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(A @ basis).Q
        basis = torch.linalg.qr(A.mT @ basis).Q
    image = A @ basis
    Q, small = torch.linalg.qr(image)
    U, s, Vh = torch.linalg.svd(small)
    return Subspace(Q @ U[:, :rank], s[:rank], basis @ Vh[:rank].mT)


def sketched_row_basis(A: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal basis ``(n, r)`` of a Gaussian sketch of the row space of ``A (m, n)``.

    One pass over ``A``: about half of a sketched :func:`leading_subspace`. Cost: ``2 m n r`` flops.

    Source: Halko, Martinsson, Tropp 2011, algorithm 4.1.
    """
    sketch = torch.randn(rank, A.shape[0], generator=generator, dtype=torch.float32).to(A)
    return torch.linalg.qr((sketch @ A).mT).Q


def singular_values(A: torch.Tensor) -> torch.Tensor:
    """All singular values ``(min(m, n),)`` of ``A``, descending, by ``eigvalsh`` of the small Gram.

    In float64 this resolves ratios ``σ_i/σ_1`` down to about 1e-8, enough for energies and plots,
    at a fraction of an SVD's time. Cost: ``2 m n min(m, n)`` flops and one ``eigvalsh``.

    Raises:
        ValueError: ``A`` is not a finite matrix.
    """
    require_matrix(A, "the matrix")
    require_finite(A, "the matrix")
    wide = A.double() if A.shape[0] <= A.shape[1] else A.double().mT
    return torch.linalg.eigvalsh(wide @ wide.mT).clamp_min(0).sqrt().flip(0)


def lstsq(
    A: torch.Tensor, B: torch.Tensor, *, relative_cutoff: float | None = None
) -> torch.Tensor:
    """Minimum-norm ``X`` that minimises ``‖A X − B‖_F`` for tall ``A (m, r)`` and ``B (m, k)``.

    QR of ``A``, then an SVD of its small triangle with small singular values cut: rank-deficient
    ``A`` (duplicated or zero columns) is handled on every device, where ``torch.linalg.lstsq`` on
    CUDA assumes full rank.

    Args:
        relative_cutoff: singular values below this times ``σ_1`` count as zero; by default
            ``max(m, r) · eps``.

    Cost: ``2 m r (r + k)`` flops and one SVD of ``(r, r)``.

    Raises:
        ValueError: ``A`` or ``B`` is not a finite matrix.
    """
    require_finite(A, "the left side")
    require_finite(B, "the right side")
    A = at_least_float32(A)
    if relative_cutoff is None:
        relative_cutoff = max(A.shape) * torch.finfo(A.dtype).eps
    Q, triangle = torch.linalg.qr(A)
    U, s, Vh = torch.linalg.svd(triangle, full_matrices=False)
    inverse = torch.where(s > relative_cutoff * s[0], 1 / s, torch.zeros_like(s))
    return Vh.mT @ (inverse[:, None] * (U.mT @ (Q.mT @ B.to(A))))


def _exact_triplets(A: torch.Tensor, rank: int) -> Subspace:
    m, n = A.shape
    if A.dtype is not torch.float32:
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        return Subspace(U[:, :rank], s[:rank], Vh[:rank].mT)
    if m > n:
        V, s, U = _exact_triplets(A.mT, rank)
        return Subspace(U, s, V)
    # Squaring in float64 keeps every digit of a float32 matrix, at a quarter of an SVD's time.
    wide = A.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    U = vectors[:, -rank:].flip(1)
    s = values[-rank:].flip(0).clamp_min(0).sqrt()
    # QR instead of a division by s: some of it may be zero.
    V, triangle = torch.linalg.qr(wide.mT @ U)
    V = torch.where(triangle.diagonal() < 0, -V, V)
    return Subspace(U.to(A), s.to(A), V.to(A))
