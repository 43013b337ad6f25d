"""A plain low-rank pair as it is served."""

from __future__ import annotations

from .chain import Chain

__all__ = ["SERVED", "LowRank"]


class LowRank(Chain):
    """``y = A (B x)``."""

    factors = ("lr_b", "lr_a")


SERVED = LowRank
