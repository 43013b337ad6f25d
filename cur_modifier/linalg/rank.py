"""How many parameters a form stores, and which rank meets a wish.

*Ratio* always means parameters stored after ÷ before, everything counted: all factors, and the bias
on both sides. Row indices are integers, not parameters; they count in bytes.
"""

from __future__ import annotations

from enum import StrEnum

import torch

from cur_modifier.linalg.checks import require_finite

__all__ = [
    "Form",
    "break_even_rank",
    "dense_parameters",
    "energy_rank",
    "ratio_rank",
    "round_rank_down",
    "round_rank_up",
    "stored_parameters",
]


class Form(StrEnum):
    """The storage forms by their names in a recipe and in a checkpoint."""

    CUR = "cur"
    ID = "id"


def dense_parameters(m: int, n: int, *, bias: bool = False) -> int:
    """Parameters of a dense ``(m, n)`` layer."""
    return m * n + m * bias


def stored_parameters(form: Form, m: int, n: int, rank: int, *, bias: bool = False) -> int:
    """Parameters of a factored ``(m, n)`` layer: ``r(m+n+r)`` as CUR, ``r(m+n−r)`` as row ID."""
    sign = 1 if form is Form.CUR else -1
    return rank * (m + n + sign * rank) + m * bias


def ratio_rank(form: Form, m: int, n: int, ratio: float, *, bias: bool = False) -> int:
    """The largest rank whose stored parameters are at most ``ratio`` times the dense ones.

    0 if even rank 1 stores more. At most ``min(m, n)``.

    Raises:
        ValueError: the ratio is outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(
            f"ratio {ratio} is outside (0, 1]: it is parameters stored after ÷ before. "
            "0.8 keeps 80 % of them."
        )
    budget = ratio * dense_parameters(m, n, bias=bias)
    return _largest_rank(form, m, n, budget, bias)


def break_even_rank(form: Form, m: int, n: int, *, bias: bool = False) -> int:
    """The largest rank that stores strictly fewer parameters than the dense layer, or 0.

    For CUR this is ``⌈(√(m² + 6mn + n²) − (m + n)) / 2⌉ − 1``, CURing's bound.
    """
    return _largest_rank(form, m, n, dense_parameters(m, n, bias=bias) - 1, bias)


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


def _largest_rank(form: Form, m: int, n: int, budget: float, bias: bool) -> int:
    # Stored parameters grow with the rank up to min(m, n) in both forms, so bisection is exact
    # where the quadratic formula would need care with rounding.
    low, high = 0, min(m, n)
    while low < high:
        middle = (low + high + 1) // 2
        if stored_parameters(form, m, n, middle, bias=bias) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
