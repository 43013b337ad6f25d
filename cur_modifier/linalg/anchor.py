"""Targets that make a compressed layer answer as the dense model would."""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import require_finite, require_gram, require_matrix

__all__ = ["anchored_target"]


def anchored_target(
    W: torch.Tensor, gram: torch.Tensor, drift: torch.Tensor, anchor: float
) -> torch.Tensor:
    """The best full-rank map of the compressed model's inputs onto the dense model's outputs.

    Behind other compressed layers a module reads ``x̃`` where the dense model has ``x``. Asked for
    ``W (a x + (1 − a) x̃)``, the best map is ``T = W + a W E[(x − x̃) x̃ᵀ] G̃⁻¹``, and the error
    of any other map ``Ŵ`` exceeds its by ``‖(T − Ŵ) G̃^{1/2}‖²``: factoring ``T`` under ``G̃`` is the
    optimal factorization for that target (reduced-rank regression, Izenman 1975).

    Args:
        W: ``(m, n)``.
        gram: ``G̃ = E[x̃ x̃ᵀ] (n, n)``, positive definite: see :func:`cur_modifier.linalg.shrunk`.
        drift: ``E[(x − x̃) x̃ᵀ] (n, n)``.
        anchor: ``a``; 0 keeps ``W``, 1 asks for the dense model's output itself. What lies between
            is a bias towards the dense model against a variance: ``T`` is estimated from tokens.

    Returns:
        ``T (m, n)``, float64.

    Cost: ``n³/3 + 2 m n²`` flops, float64.

    Raises:
        ValueError: a shape or an entry is wrong, ``gram`` is singular, or ``anchor`` is outside
            [0, 1].
    """
    require_matrix(W, "the weight")
    require_gram(gram, W.shape[1])
    require_finite(drift, "the drift")
    if not 0 <= anchor <= 1:
        raise ValueError(
            f"anchor {anchor} is outside [0, 1]: it is the dense model's share in the target."
        )
    wide = W.double()
    if anchor == 0:
        return wide
    root, failed = torch.linalg.cholesky_ex(gram.double())
    if failed:
        raise ValueError(
            "the compressed inputs' Gram matrix is singular. Calibrate on more tokens than the "
            f"layer has inputs ({W.shape[1]}), or shrink it first."
        )
    return wide + anchor * torch.cholesky_solve((wide @ drift.double()).mT, root).mT
