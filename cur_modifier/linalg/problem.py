"""One weight to be factored: what is to be approximated, in which norm, and made of what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cur_modifier.linalg.scores import Score, score
from cur_modifier.linalg.selection import Selection

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """Factors of ``W (m, n)`` at ``rank``.

    Each decomposition's module has ``solve(problem)``; what it makes no use of it passes over.

    Attributes:
        gram: ``G`` of the inputs in the norm of the fit, ``(n, n)`` or ``(n,)``, or None.
        outputs: metric ``H`` of the outputs, ``(m, m)`` or ``(m,)``, or None.
        target: ``(m, n)``, what the factors approximate in place of ``W``; real rows and columns
            are those of ``W`` all the same.
        selection: how real rows and columns are chosen. None is the optimal approximation of the
            rank, in forms that have one.
        scores: what the selection looks at; None is the weight itself.
        second_moment: ``E[x xᵀ] (n, n)``, where the scores ask for it.
        noise: relative error power that a later stage will bring to the first factor.
        blocks: where ``W`` stacks weights that are to share a skeleton, the outputs of each and how
            many of them the skeleton gives directly.
        seed: of every random choice.
    """

    W: torch.Tensor
    rank: int
    gram: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    target: torch.Tensor | None = None
    selection: Selection | None = None
    scores: Score | None = None
    second_moment: torch.Tensor | None = None
    noise: float = 0.0
    blocks: Sequence[tuple[int, int]] | None = None
    seed: int = 0

    @property
    def wanted(self) -> torch.Tensor:
        """What the factors approximate, ``(m, n)``."""
        return self.W if self.target is None else self.target.to(self.W)

    @property
    def scored(self) -> torch.Tensor:
        """What a selection looks at, ``(m, n)``."""
        return self.W if self.scores is None else score(self.scores, self.W, self.second_moment)
