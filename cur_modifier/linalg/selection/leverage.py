"""Rows by their leverage on a subspace."""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import at_least_float32
from cur_modifier.linalg.selection.basis import largest, require_basis

__all__ = ["leverage_sampled", "leverage_scores", "leverage_top"]


def leverage_scores(V: torch.Tensor) -> torch.Tensor:
    """Leverage ``ℓ_i = ‖V[i, :]‖²`` of every row of an orthonormal ``V (m, r)``; they sum to ``r``.

    Source: Mahoney and Drineas 2009.
    """
    require_basis(V)
    return at_least_float32(V).square().sum(dim=1)


def leverage_top(V: torch.Tensor) -> torch.Tensor:
    """The ``r`` rows of ``V (m, r)`` of highest leverage, ties by index."""
    return largest(leverage_scores(V), V.shape[1])


def leverage_sampled(V: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``r`` distinct rows of ``V (m, r)``, drawn with probability proportional to leverage.

    Source: Mahoney and Drineas 2009, section 2, without replacement.
    """
    # A floor keeps enough rows drawable when fewer than r have any leverage.
    weights = leverage_scores(V).double().cpu() + torch.finfo(torch.float32).tiny
    return torch.multinomial(weights, V.shape[1], generator=generator).to(V.device)
