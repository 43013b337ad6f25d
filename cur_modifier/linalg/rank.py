"""The rank that holds a share of a spectrum, and ranks in whole steps."""

from __future__ import annotations

import torch

from cur_modifier.linalg.checks import require_finite

__all__ = ["energy_rank", "round_rank_down", "round_rank_up"]


def energy_rank(singular_values: torch.Tensor, energy: float) -> int:
    """The smallest rank whose leading singular values hold ``energy`` of ``Σ σ_i²``.

    At least 1, also for an all-zero spectrum.

    Raises:
        ValueError: the energy is outside (0, 1], or the spectrum is empty, not 1-D or not finite.
    """
    if not 0 < energy <= 1:
        raise ValueError(
            f"energy {energy} is outside (0, 1]: it is a share of the squared spectrum. "
            "0.95 keeps 95 % of it."
        )
    if singular_values.ndim != 1 or singular_values.numel() == 0:
        raise ValueError(
            f"the singular values have shape {tuple(singular_values.shape)}; "
            "expected a non-empty vector, descending."
        )
    require_finite(singular_values, "the vector of singular values")
    squares = singular_values.double().square()
    total = squares.sum()
    if total == 0:
        return 1
    # Rounding may leave the full sum an ulp short of the total, so the last rank always qualifies.
    held = squares.cumsum(0)[:-1] >= energy * total * (1 - 1e-12)
    hits = held.nonzero()
    return int(hits[0]) + 1 if hits.numel() else squares.numel()


def round_rank_down(rank: int, multiple_of: int) -> int:
    """The largest multiple of ``multiple_of`` that is at most ``rank`` (0 if there is none)."""
    _require_positive(multiple_of)
    return rank - rank % multiple_of


def round_rank_up(rank: int, multiple_of: int) -> int:
    """The smallest multiple of ``multiple_of`` that is at least ``rank``."""
    _require_positive(multiple_of)
    return rank + -rank % multiple_of


def _require_positive(multiple_of: int) -> None:
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}; a rank is rounded to a positive multiple.")
