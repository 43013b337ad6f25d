"""Least squares for the factors that a factorization is free to choose."""

from __future__ import annotations

import torch

from cur_modifier.linalg.metric import apply_gram
from cur_modifier.linalg.subspace import lstsq

__all__ = ["fit_right", "solve_stored"]

# A Gram matrix summed in float32 says nothing below this fraction of its mean eigenvalue. Adding
# that much identity makes the fit fall back to the plain norm there instead of amplifying noise.
_DAMPING = torch.finfo(torch.float32).eps


def solve_stored(A: torch.Tensor, B: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Least squares ``A X ≈ B`` whose solution survives being stored in dtype ``stored``.

    Along a singular value ``σ`` of ``A`` the solution has entries of size ``1/σ``, and rounding
    them costs ``eps/σ`` where cutting them costs ``σ``: the cut that balances both is ``√eps``.
    Columns are scaled to unit length first, so that one outlier does not cut all the others.
    """
    scale = _reciprocal(torch.linalg.vector_norm(A, dim=0))
    cutoff = torch.finfo(stored).eps ** 0.5
    return scale[:, None] * lstsq(A * scale, B, relative_cutoff=cutoff)


def fit_right(
    target: torch.Tensor,
    skeleton: torch.Tensor,
    gram: torch.Tensor | None,
    stored: torch.dtype,
    noise: float = 0.0,
) -> torch.Tensor:
    """``X (k, r)`` that minimises ``‖(target − X · skeleton) G^{1/2}‖_F``, in float64.

    With ``noise``, every output ``z_i`` of the skeleton is expected to come with an independent
    error of ``noise · E[z_i²]``, as after quantizing it, and ``X`` minimises the expected error of
    ``X z``: a ridge that keeps ``X`` from amplifying what the skeleton gets wrong.

    Under ``G`` by normal equations: ``G`` is known to float32 only, so squaring its condition costs
    nothing in float64, and neither ``G`` nor its root is ever factored.
    """
    if gram is None and noise:
        gram = torch.ones(skeleton.shape[1], dtype=skeleton.dtype, device=skeleton.device)
    if gram is None:
        return solve_stored(skeleton.mT, target.mT, stored).mT
    diagonal = gram if gram.ndim == 1 else gram.diagonal()
    damping = _DAMPING * diagonal.double().mean()
    weighted = apply_gram(skeleton, gram) + damping * skeleton
    normal = skeleton @ weighted.mT
    scale = _reciprocal(normal.diagonal().clamp_min(0).sqrt())  # rows of unit length, as in solve
    normal = scale[:, None] * normal * scale
    normal.diagonal().mul_(1 + noise)
    values, vectors = torch.linalg.eigh((normal + normal.mT) / 2)
    floor = normal.shape[0] * torch.finfo(torch.float64).eps * values[-1].clamp_min(0)
    inverse = torch.where(values > floor, 1 / values, torch.zeros_like(values))
    return ((target @ (scale[:, None] * weighted).mT) @ (vectors * inverse)) @ vectors.mT * scale


def _reciprocal(lengths: torch.Tensor) -> torch.Tensor:
    return torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
