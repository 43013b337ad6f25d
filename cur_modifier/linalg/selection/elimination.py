"""Units that the others interpolate best, given up one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cur_modifier.linalg.checks import (
    require_finite,
    require_gram,
    require_matrix,
    require_rank,
)

__all__ = ["Elimination", "eliminate", "elimination"]

# The matrices are written anew after so many eliminated features; between, their updates are kept
# as thin factors. More factors cost more a step, fewer cost more passes over the matrices.
_AFRESH = 128
# Share of the mean diagonal that makes products of dependent rows definite.
_JITTER = 1e-10


@dataclass(frozen=True)
class Elimination:
    """In which order units were given up, and what that costs.

    Attributes:
        order: ``(steps,)`` indices of units, the first one to go first.
        growth: ``(steps + 1,)``: entry ``k`` is the error after ``k`` of them are gone, 0 first.
    """

    order: torch.Tensor
    growth: torch.Tensor


def eliminate(
    gram: torch.Tensor, metric: torch.Tensor, units: torch.Tensor, steps: int
) -> Elimination:
    """Give up ``steps`` units of an activation ``h``, each the one that is missed least.

    ``y = W h`` is read in a metric ``H``, with ``M = Wᵀ H W``. Without the features ``b`` of a unit
    the others ``J`` interpolate ``h``, and the best that they do is
    ``min_X E‖H^{1/2} W (h − X h_J)‖²``. With ``P = G[J, J]⁻¹`` and ``D = Cᵀ H C`` of the corrected
    weight ``C = W G[:, J] P``, giving up ``b`` raises that minimum by exactly
    ``tr(P_bb⁻¹ D_bb)``. Choices are nested, so one run serves every count.

    Args:
        gram: ``G = E[h hᵀ] (n, n)``, positive definite: see :func:`cur_modifier.linalg.shrunk`.
        metric: ``M (n, n)``.
        units: ``(u, w)`` indices of the features of every unit. Features of none are always kept.
        steps: how many, fewer than ``u`` where all features are in units.

    Cost: an inverse, ``2 n³``; ``6 n²`` flops a feature given up, and as many again spread over the
    steps; float64. Memory: ``2 n²`` numbers, and ``3 · 128 n``.

    Source: Hassibi and Stork 1992 (optimal brain surgeon); Kurtic et al. 2023 (ZipLM), for blocks.

    Raises:
        ValueError: a shape does not fit, an entry is not finite, ``gram`` is singular, or ``steps``
            is out of range.
    """
    require_matrix(gram, "the Gram matrix")
    n = gram.shape[0]
    require_gram(gram, n)
    require_finite(metric, "the metric of the units")
    if metric.shape != (n, n):
        raise ValueError(f"the metric of the units has shape {tuple(metric.shape)}; it takes {n}².")
    if not 0 <= steps <= len(units):
        raise ValueError(f"{steps} of {len(units)} units can't be given up.")
    root, failed = torch.linalg.cholesky_ex(gram.double())
    if failed:
        raise ValueError(
            "the Gram matrix is singular. Calibrate on more tokens than there are features "
            f"({n}), or shrink it first."
        )
    left = _Left(torch.cholesky_inverse(root), metric.double().clone(), units.to(gram.device))
    order: list[int] = []
    growth = [0.0]
    for _ in range(steps):
        unit, cost = left.least()
        left.give_up(unit)
        order.append(unit)
        growth.append(growth[-1] + cost)
    return Elimination(
        torch.tensor(order, dtype=torch.long, device=gram.device),
        torch.tensor(growth, dtype=torch.float64),
    )


def elimination(A: torch.Tensor, count: int, metric: torch.Tensor | None = None) -> torch.Tensor:
    """Indices ``(count,)`` of rows ``I`` of ``A (m, n)``, those that are left when the others are
    given up one after another, the last that would go first.

    What :func:`~.greedy.greedy` builds up this takes down: each step raises
    ``min_X ‖M^{1/2} (A − X A[I])‖_F`` least. The better of the two where most rows stay.

    Args:
        metric: as for :func:`~.greedy.greedy`.

    Cost: that of :func:`eliminate` with ``n = m``, and ``2 m² n`` flops.

    Raises:
        ValueError: as :func:`~.greedy.greedy`.
    """
    m = A.shape[0]
    require_rank(count, m, f"a matrix of {m} rows")
    A = A.double()
    gram = A @ A.mT
    # Rows that depend on each other leave no inverse; so little changes no choice that matters.
    gram.diagonal().add_(_JITTER * gram.diagonal().mean() + torch.finfo(A.dtype).tiny)
    M = A.new_ones(m) if metric is None else metric.to(A)
    M = torch.diag(M) if M.ndim == 1 else M
    every = torch.arange(m, device=A.device)
    gone = eliminate(gram, M, every[:, None], m - 1).order
    last = every[~torch.isin(every, gone)]
    return torch.cat([last, gone.flip(0)])[:count]


class _Left:
    """What is left after some units are given up: ``P`` and ``D`` of :func:`eliminate`.

    Both are kept as they were at the last writing, minus thin factors: ``P = P₀ − V Q⁻¹ Vᵀ`` step
    by step, and ``D = D₀ − A Bᵀ − B Aᵀ``. Their blocks on the diagonal are up to date.
    """

    def __init__(self, P: torch.Tensor, D: torch.Tensor, units: torch.Tensor) -> None:
        self.units = units
        self.P, self.D = P, D
        self.open = torch.ones(len(units), dtype=torch.bool, device=P.device)
        self.width = units.shape[1]
        self._held = max(1, _AFRESH // self.width) * self.width
        self.V, self.S = P.new_zeros(len(P), self._held), P.new_zeros(len(P), self._held)
        self.A = P.new_zeros(len(P), self._held)
        self._used = 0
        rows, columns = units[:, :, None], units[:, None, :]
        self.P_blocks, self.D_blocks = P[rows, columns], D[rows, columns]

    def least(self) -> tuple[int, float]:
        """The unit that is missed least, and by how much."""
        if self.width == 1:
            costs = (self.D_blocks / self.P_blocks)[:, 0, 0]
        else:
            roots = torch.linalg.cholesky(self.P_blocks)
            solved = torch.cholesky_solve(self.D_blocks, roots)
            costs = solved.diagonal(dim1=1, dim2=2).sum(1)
        costs = torch.where(self.open, costs, torch.inf)
        unit = int(costs.argmin())
        return unit, max(float(costs[unit]), 0.0)

    def give_up(self, unit: int) -> None:
        """Take a unit's features out, and correct the others for it."""
        if self._used == self._held:
            self._write()
        b, used = self.units[unit], slice(0, self._used)
        new = slice(self._used, self._used + self.width)
        P_b = self.P[:, b] - self.S[:, used] @ self.V[b, used].mT
        D_b = self.D[:, b] - self.A[:, used] @ self.S[b, used].mT
        D_b -= self.S[:, used] @ self.A[b, used].mT
        share = torch.linalg.solve(P_b[b], P_b, left=False)  # P_:b P_bb⁻¹
        # D − D_:b shareᵀ − share D_b: + share D_bb shareᵀ, as one symmetric pair.
        half = D_b - share @ D_b[b] / 2
        self.V[:, new], self.S[:, new], self.A[:, new] = P_b, share, half
        self._used += self.width
        units = self.units
        self.P_blocks -= share[units] @ P_b[units].mT
        mixed = half[units] @ share[units].mT
        self.D_blocks -= mixed + mixed.mT
        self.open[unit] = False
        # What is given up is the identity from now on, so that no later step divides by its zero.
        self.P_blocks[unit] = torch.eye(self.width, dtype=P_b.dtype, device=P_b.device)

    def _write(self) -> None:
        self.P -= self.S @ self.V.mT
        mixed = self.A @ self.S.mT
        self.D -= mixed + mixed.mT
        self._used = 0
