"""Metrics of inputs and outputs, and what is computed from them once.

A weight ``W (m, n)`` acts on inputs ``x (n,)``. The mean squared error of replacing it by ``Ŵ`` is
``E‖(W − Ŵ) x‖² = ‖(W − Ŵ) G^{1/2}‖_F²`` with the Gram matrix ``G = E[x xᵀ]``: the data enter every
factorization of this package through ``G`` alone. ``H`` is a metric of the outputs, e.g. the
curvature of the loss there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cur_modifier.linalg.checks import require_finite, require_gram, require_matrix
from cur_modifier.linalg.subspace import singular_values

__all__ = [
    "apply_gram",
    "curvature_spectrum",
    "damped",
    "gram_norm",
    "gram_sqrt",
    "relative_error",
    "shrunk",
    "unweighted",
    "weighted",
    "weighted_spectrum",
]


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


def relative_error(
    W: torch.Tensor, approximation: torch.Tensor, gram: torch.Tensor | None
) -> float:
    """``‖(W − Ŵ) G^{1/2}‖_F / ‖W G^{1/2}‖_F``, both ``(m, n)``; 0 for a zero weight."""
    whole = gram_norm(W, gram)
    return gram_norm(W - approximation, gram) / whole if whole else 0.0


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


def weighted_spectrum(W: torch.Tensor, mean_square: torch.Tensor | None) -> torch.Tensor:
    """Singular values ``(min(m, n),)`` of ``W diag(E[x²])^{1/2}``, or of ``W``; descending."""
    scale = 1.0 if mean_square is None else mean_square.double().sqrt().to(W.device)
    return singular_values(W.detach().double() * scale)


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


def weighted(outputs: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """``Lᵀ M`` for ``H = L Lᵀ``; ``M`` itself without ``H``."""
    if outputs is None:
        return matrix
    root = _root(outputs, matrix)
    return root[:, None] * matrix if root.ndim == 1 else root.mT @ matrix


def unweighted(outputs: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """``L⁻ᵀ M``, the inverse of :func:`weighted`."""
    if outputs is None:
        return matrix
    root = _root(outputs, matrix)
    if root.ndim == 1:
        return matrix / root[:, None]
    return torch.linalg.solve_triangular(root.mT, matrix, upper=True)


def _root(outputs: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    m = like.shape[0]
    if outputs.shape not in {(m, m), (m,)}:
        raise ValueError(
            f"the metric of the outputs has shape {tuple(outputs.shape)}; expected ({m}, {m}) or "
            f"its diagonal ({m},)."
        )
    if outputs.ndim == 1:
        root, failed = outputs.to(like).sqrt(), bool((outputs <= 0).any())
    else:
        root, info = torch.linalg.cholesky_ex(outputs.to(like))
        failed = bool(info)
    if failed or not bool(torch.isfinite(root).all()):
        raise ValueError(
            "the metric of the outputs is not positive definite. Add a share of its mean diagonal "
            "to the diagonal."
        )
    return root


def _pseudo_reciprocal(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, 1 / values, torch.zeros_like(values))
