"""Second moments of activations, streamed, and what is computed from them once.

A weight ``W (m, n)`` acts on inputs ``x (n,)``. The mean squared error of replacing it by ``Ŵ`` is
``E‖(W − Ŵ) x‖² = ‖(W − Ŵ) G^{1/2}‖_F²`` with the Gram matrix ``G = E[x xᵀ]``: the data enter every
factorization of this package through ``G`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from cur_modifier.linalg.checks import require_finite, require_gram, require_matrix

__all__ = [
    "GramAccumulator",
    "PairedMoments",
    "apply_gram",
    "curvature_spectrum",
    "damped",
    "gram_norm",
    "gram_sqrt",
    "shrunk",
]


class GramAccumulator:
    """Streaming estimate of ``G = E[x xᵀ]``.

    Args:
        features: ``n``, the length of ``x``.
        device: where the sum is kept; batches are moved there.
        dtype: of the products and the sum. float32 matches the accuracy of the activations.

    Cost: ``2 n² t`` flops for ``t`` tokens, ``n²`` entries of memory.
    """

    def __init__(
        self,
        features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.features = features
        self.tokens = 0
        self._sum = torch.zeros(features, features, device=device, dtype=dtype)

    def update(self, x: torch.Tensor) -> None:
        """Add the tokens ``x (..., n)``.

        Raises:
            ValueError: the last dimension is not ``n``.
        """
        if x.shape[-1] != self.features:
            raise ValueError(
                f"activations have {x.shape[-1]} features, this Gram matrix has {self.features}."
            )
        rows = x.detach().reshape(-1, self.features).to(self._sum)
        with _products_in(x.dtype):
            self._sum.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    def second_moment(self) -> torch.Tensor:
        """``G (n, n)``, symmetric, in the accumulator's dtype.

        Raises:
            ValueError: no token was seen, or the activations held NaN or infinity.
        """
        if self.tokens == 0:
            raise ValueError("no token reached this module: its Gram matrix is undefined.")
        gram = self._sum / self.tokens
        require_finite(gram.diagonal(), "the activations' second moment")
        return gram


class PairedMoments:
    """Streaming ``E[x̃ x̃ᵀ]`` and ``E[(x − x̃) x̃ᵀ]`` of one module's inputs in two models.

    ``x`` is what the module reads in the dense model, ``x̃`` what it reads in the compressed one, on
    the same token. Anchoring a factorization to the dense model takes both moments, see
    :func:`cur_modifier.linalg.anchored_target`. The second one is of the difference itself: as a
    difference of moments it would drown in their rounding.

    Args:
        features: ``n``.
        device: where the sums are kept; batches are moved there.

    Cost: ``4 n² t`` flops for ``t`` tokens, ``2 n²`` float32 numbers. Products of half-precision
    inputs run in half precision, and are summed and kept in float32: rounding a moment itself to
    16 bits would make it indefinite where one feature is massive.
    """

    def __init__(self, features: int, *, device: torch.device | str | None = None) -> None:
        self.features = features
        self.tokens = 0
        self._gram = torch.zeros(features, features, device=device)
        self._drift = torch.zeros(features, features, device=device)

    def update(self, compressed: torch.Tensor, dense: torch.Tensor) -> None:
        """Add the tokens ``x̃ (..., n)`` and ``x (..., n)``.

        Raises:
            ValueError: the two differ in shape, or do not have ``n`` features.
        """
        if compressed.shape != dense.shape or compressed.shape[-1] != self.features:
            raise ValueError(
                f"the compressed model's inputs {tuple(compressed.shape)} and the dense model's "
                f"{tuple(dense.shape)} must be the same tokens, of {self.features} features each."
            )
        rows = compressed.detach().reshape(-1, self.features).to(self._gram)
        moved = dense.detach().reshape(-1, self.features).to(self._gram) - rows
        with _products_in(compressed.dtype):
            self._gram.addmm_(rows.T, rows)
            self._drift.addmm_(moved.T, rows)
        self.tokens += rows.shape[0]

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``E[x̃ x̃ᵀ] (n, n)`` and ``E[(x − x̃) x̃ᵀ] (n, n)``, float32.

        Raises:
            ValueError: no token was seen, or the activations held NaN or infinity.
        """
        if self.tokens == 0:
            raise ValueError("no token reached this module: its Gram matrix is undefined.")
        gram, drift = self._gram / self.tokens, self._drift / self.tokens
        require_finite(gram.diagonal(), "the activations' second moment")
        require_finite(drift.diagonal(), "the activations' drift")
        return gram, drift


def shrunk(gram: torch.Tensor, share: float) -> torch.Tensor:
    """``G + share · diag(G)``, plus enough identity to be positive definite, in float64.

    The Gram matrix of ``t`` tokens has ``n − t`` zero eigenvalues too many where ``t < n``, and its
    small ones are too small where ``t`` is a few times ``n``. Adding its diagonal lifts them in
    proportion to the scale of their own features: one token with a massive activation lifts nothing
    but its own.
    """
    diagonal = gram.diagonal().double()
    floor = torch.finfo(torch.float32).eps * diagonal.mean()
    result = gram.double().clone()
    result.diagonal().add_(share * diagonal + floor)
    return result


def gram_sqrt(gram: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Symmetric square root ``G^{1/2}``, or its pseudo-inverse, in float64.

    Goes through ``eigh`` with eigenvalues clamped at zero. The Gram matrix of a real model is
    singular to working precision, so a Cholesky factorization fails on it or loses all accuracy.

    Args:
        gram: ``(n, n)`` symmetric positive semi-definite, or its diagonal ``(n,)``.
        inverse: return ``(G^{1/2})⁺``; eigenvalues below ``n · eps · λ_max`` count as zero.

    Cost: about ``9 n³`` flops for a full matrix, ``n`` for a diagonal.

    Raises:
        ValueError: ``gram`` is neither of these, or not finite.
    """
    require_gram(gram, gram.shape[-1])
    if gram.ndim == 1:
        root = gram.double().clamp_min(0).sqrt()
        return _pseudo_reciprocal(root) if inverse else root
    values, vectors = torch.linalg.eigh(gram.double())
    roots = values.clamp_min(0).sqrt()
    if inverse:
        # The input carries float32 noise at best, so the cut is made at its precision.
        floor = gram.shape[0] * torch.finfo(torch.float32).eps * float(values[-1].clamp_min(0))
        roots = torch.where(values > floor, roots, torch.zeros_like(roots))
        roots = _pseudo_reciprocal(roots)
    return (vectors * roots) @ vectors.T


def apply_gram(matrix: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """``matrix @ G`` for ``G`` given in full ``(n, n)`` or by its diagonal ``(n,)``."""
    gram = gram.to(matrix)
    return matrix * gram if gram.ndim == 1 else matrix @ gram


def gram_norm(matrix: torch.Tensor, gram: torch.Tensor | None = None) -> float:
    """``‖matrix · G^{1/2}‖_F = sqrt(tr(M G Mᵀ))``, or the Frobenius norm without ``gram``.

    Needs no square root of ``G``. Cost: ``2 m n²`` flops, float64.

    Raises:
        ValueError: ``matrix`` or ``gram`` is not finite, or they do not fit.
    """
    require_matrix(matrix, "the matrix")
    require_finite(matrix, "the matrix")
    matrix = matrix.double()
    if gram is None:
        return float(torch.linalg.matrix_norm(matrix))
    require_gram(gram, matrix.shape[1])
    return float((apply_gram(matrix, gram) * matrix).sum().clamp_min(0).sqrt())


def curvature_spectrum(W: torch.Tensor, gram: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Squared singular values ``(min(m, n),)`` of ``H^{1/2} W G^{1/2}``, descending, float64.

    Half the sum of all but the ``r`` largest is the loss's second-order growth, under the Kronecker
    approximation, at the best rank-``r`` approximation of ``W (m, n)``.

    Args:
        gram: ``G (n, n)``.
        outputs: ``H (m, m)`` or its diagonal ``(m,)``.

    Cost: ``2 m n (m + n)`` flops, ``eigh`` and ``eigvalsh`` of the short side, float64.
    """
    wide, G, H = W.double(), gram.double(), outputs.double()
    m, n = W.shape
    if m < n:
        root, moment = gram_sqrt(H), apply_gram(wide, G) @ wide.mT
    else:
        root, moment = gram_sqrt(G), wide.mT @ (H[:, None] * wide if H.ndim == 1 else H @ wide)
    moment = root[:, None] * moment * root if root.ndim == 1 else root @ moment @ root
    return torch.linalg.eigvalsh((moment + moment.mT) / 2).clamp_min(0).flip(0)


def damped(metric: torch.Tensor, share: float, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """``H + share · mean(diag H) · I`` in float64; of a diagonal ``(m,)``, its entries raised.

    A curvature estimated from few tokens calls some directions free that are not. One that was
    rounded to 16 bits may call some better than free: where a few directions hold nearly all of it,
    their rounding exceeds the share of the mean. What is negative is then taken for 0.

    Args:
        sizes: outputs of every module, where ``H`` is that of several, stacked: each is raised by
            its own mean, or the one with the largest gradients would drown the others.

    Cost: ``m³ / 3`` flops, and an ``eigh`` where it was rounded so.
    """
    H = metric.double()
    diagonal = H if H.ndim == 1 else H.diagonal()
    raised = diagonal.clone()
    for part in raised.split(list(sizes or [len(raised)])):
        # The extra keeps an all-zero metric, of outputs that the loss never sees, definite.
        part.add_(share * part.mean() + torch.finfo(torch.float64).tiny ** 0.5)
    if H.ndim == 1:
        return raised
    damping = torch.diag(raised - diagonal)
    result = H + damping
    if bool(torch.linalg.cholesky_ex(result).info) and bool(torch.isfinite(result).all()):
        values, vectors = torch.linalg.eigh(H)
        result = (vectors * values.clamp_min(0)) @ vectors.mT + damping
    return result


@contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """Float32 products whose factors are exact in ``dtype`` may be computed in it."""
    before = torch.get_float32_matmul_precision()
    if dtype is torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _pseudo_reciprocal(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))
