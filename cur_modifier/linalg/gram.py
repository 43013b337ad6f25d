"""Second moments of activations, streamed, and what is computed from them once.

A weight ``W (m, n)`` acts on inputs ``x (n,)``. The mean squared error of replacing it by ``Ŵ`` is
``E‖(W − Ŵ) x‖² = ‖(W − Ŵ) G^{1/2}‖_F²`` with the Gram matrix ``G = E[x xᵀ]``: the data enter every
factorization of this package through ``G`` alone.
"""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import require_finite, require_gram, require_matrix

__all__ = ["GramAccumulator", "apply_gram", "gram_norm", "gram_sqrt"]


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


def _pseudo_reciprocal(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))
