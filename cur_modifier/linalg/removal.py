"""Removal: some units of a hidden activation are kept, the others interpolated from them.

``y = W h`` reads an activation ``h (n,)`` made of units: neurons of one feature, heads of several.
No rotation passes the nonlinearity or the attention that computes ``h``, so a smaller layer keeps
real units ``J``. The others are interpolated, ``h ≈ X h_J``, and the consumer absorbs the
interpolation: ``W' = W X`` is dense and has as many columns as features are kept. This is an
interpolative decomposition of the activation (Chee et al. 2022, STAT), in the metrics ``G`` of the
activation and ``H`` of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cur_modifier.linalg.checks import require_gram, require_matrix
from cur_modifier.linalg.metric import apply_gram, gram_sqrt
from cur_modifier.linalg.selection import (
    Selection,
    eliminate,
    leverage_scores,
    norm,
    random,
    select_rows,
)
from cur_modifier.linalg.subspace import leading_subspace

__all__ = [
    "OF_BLOCKS",
    "Removal",
    "RemovalProblem",
    "growth_by_count",
    "interpolation",
    "kept_features",
    "solve",
]

# Selections that choose units of several features, too.
OF_BLOCKS = (Selection.ELIMINATION, Selection.NORM, Selection.LEVERAGE, Selection.RANDOM)


@dataclass(frozen=True)
class RemovalProblem:
    """Which ``count`` units to keep, and what the consumer's weight becomes.

    Attributes:
        W: ``(m, n)`` of the consumer. With a bias as a last column, whose feature is the constant
            1, means are corrected for as well.
        gram: ``G = E[h hᵀ] (n, n)``, positive definite: see :func:`cur_modifier.linalg.shrunk`.
        units: ``(u, w)``, the features of every unit. Features of none are always kept.
        count: units to keep.
        outputs: metric ``H`` of the outputs, ``(m, m)`` or ``(m,)``; the identity without.
        target: ``(m, n)``, what the corrected weight approximates in place of ``W``; see
            :func:`cur_modifier.linalg.anchored_target`.
        selection: how units are chosen.
        corrected: whether the consumer absorbs the interpolation; else its columns stay.
        max_entry: exchange units until no entry of the interpolation is larger; None exchanges
            none. Only for units of one feature.
        seed: of a random selection.
    """

    W: torch.Tensor
    gram: torch.Tensor
    units: torch.Tensor
    count: int
    outputs: torch.Tensor | None = None
    target: torch.Tensor | None = None
    selection: Selection = Selection.ELIMINATION
    corrected: bool = True
    max_entry: float | None = None
    seed: int = 0

    @property
    def wanted(self) -> torch.Tensor:
        """What the corrected weight approximates, ``(m, n)``, float64."""
        return (self.W if self.target is None else self.target).double()


@dataclass(frozen=True)
class Removal:
    """The solution of a problem.

    Attributes:
        kept: ``(count,)`` units, ascending.
        weight: ``(m, k)`` of the ``k`` kept features in their order, float64.
        max_entry: the largest entry of the interpolation of removed features.
    """

    kept: torch.Tensor
    weight: torch.Tensor
    max_entry: float


def solve(problem: RemovalProblem) -> Removal:
    """Choose units, and correct the consumer for those that go.

    Minimises ``tr H (T − W' X⁺) G (…)ᵀ`` over ``W'`` for the units that the selection chose, with
    ``T`` the target: ``W' = T G[:, J] G[J, J]⁻¹``, whatever ``H``.

    Cost: that of the selection; ``k³/3 + 2 k² n + 2 m n k`` flops, float64.

    Raises:
        ValueError: shapes that do not fit, a singular ``gram``, a count outside ``1..u``, or a
            selection or bound that does not fit units of several features.
    """
    W, G = problem.W, problem.gram.double()
    require_matrix(W, "the consumer's weight")
    require_matrix(G, "the Gram matrix")
    require_gram(G, W.shape[1])
    if not 1 <= problem.count <= len(problem.units):
        raise ValueError(
            f"{problem.count} units are to be kept of {len(problem.units)}. Keep at least one."
        )
    kept = _selected(problem).sort().values
    if problem.max_entry is not None:
        kept = _exchanged(G, kept, problem).sort().values
    features = kept_features(problem.units, kept, W.shape[1])
    X = interpolation(G, features)
    gone = torch.ones(W.shape[1], dtype=torch.bool, device=G.device)
    gone[features] = False
    largest = float(X[gone].abs().max()) if bool(gone.any()) else 0.0
    weight = problem.wanted @ X if problem.corrected else W.double()[:, features]
    return Removal(kept, weight, largest)


def interpolation(gram: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """``X = G[:, J] G[J, J]⁻¹ (n, k)``: the best linear guess of ``h`` from ``h_J``, exact in the
    rows ``J``.

    Raises:
        ValueError: ``G[J, J]`` is singular.
    """
    columns = gram[:, features]
    root, failed = torch.linalg.cholesky_ex(columns[features])
    if failed:
        raise ValueError(
            "the Gram matrix of the units that stay is singular. Calibrate on more tokens than "
            f"there are features ({len(gram)}), or shrink it first."
        )
    X = torch.cholesky_solve(columns.mT, root).mT
    X[features] = torch.eye(len(features), dtype=X.dtype, device=X.device)
    return X


def kept_features(units: torch.Tensor, kept: torch.Tensor, total: int) -> torch.Tensor:
    """Indices, ascending, of the features of ``kept`` units and of no unit, of ``total``."""
    units = units.to(kept.device)
    stays = torch.ones(total, dtype=torch.bool, device=kept.device)
    stays[units.flatten()] = False
    stays[units[kept].flatten()] = True
    return stays.nonzero().flatten()


def growth_by_count(
    W: torch.Tensor, gram: torch.Tensor, outputs: torch.Tensor | None, units: torch.Tensor
) -> torch.Tensor:
    """``(u + 1,)``: entry ``k`` is the least error ``E‖H^{1/2} (W h − W' h_J)‖²`` with ``k`` units
    kept, by elimination. Infinite for none.

    Cost: that of :func:`~.selection.eliminate` for all units.
    """
    found = eliminate(gram, _metric(W, outputs), units, len(units) - 1)
    return torch.cat([torch.tensor([torch.inf]).double(), found.growth.flip(0).cpu()])


def _selected(problem: RemovalProblem) -> torch.Tensor:
    kind, units, count = problem.selection, problem.units, problem.count
    G = problem.gram.double()
    units = units.to(G.device)
    if kind is Selection.ELIMINATION:
        gone = eliminate(G, _metric(problem.wanted, problem.outputs), units, len(units) - count)
        every = torch.arange(len(units), device=G.device)
        return every[~torch.isin(every, gone.order)]
    if kind is Selection.RANDOM:
        generator = torch.Generator().manual_seed(problem.seed)
        return random(len(units), count, generator).to(G.device)
    M = _metric(problem.W.double(), problem.outputs)
    if kind is Selection.NORM:  # rows of G^{1/2} are as long as the roots of G's diagonal
        squares = (M.diagonal() * G.diagonal()).clamp_min(0)[units].sum(1)
        return norm(squares.sqrt()[:, None], count)
    if units.shape[1] == 1:
        rows = units[:, 0]
        A, M = gram_sqrt(G)[rows], M[rows][:, rows]
        if kind is Selection.GREEDY:  # which weighs them itself
            return select_rows(kind, A, count, outputs=M)
        scored = M.diagonal().clamp_min(0).sqrt()[:, None] * A
        return select_rows(kind, scored, count, seed=problem.seed)
    if kind not in OF_BLOCKS:
        raise ValueError(
            f"selection '{kind}' chooses single features, and a unit here has {units.shape[1]}. "
            f"Choose {', '.join(OF_BLOCKS)}."
        )
    scored = M.diagonal().clamp_min(0).sqrt()[:, None] * gram_sqrt(G)
    basis = leading_subspace(scored, min(count * units.shape[1], len(scored))).U
    return norm(leverage_scores(basis).sqrt()[units], count)


def _metric(W: torch.Tensor, outputs: torch.Tensor | None) -> torch.Tensor:
    """``M = Wᵀ H W (n, n)``."""
    W = W.double()
    return W.mT @ (W if outputs is None else apply_gram(W.mT, outputs.double()).mT)


def _exchanged(G: torch.Tensor, kept: torch.Tensor, problem: RemovalProblem) -> torch.Tensor:
    """Units exchanged until the interpolation has no entry above ``max_entry``.

    An exchange of ``j`` in ``J`` for ``i`` outside multiplies ``det G[J, J]`` by at least
    ``X[i, j]²``, so with a bound above 1 it ends (Gu and Eisenstat 1996).
    """
    bound, units = problem.max_entry, problem.units.to(G.device)
    assert bound is not None
    if units.shape[1] > 1 or bound <= 1:
        raise ValueError(
            f"max_entry {bound} with units of {units.shape[1]} features: it bounds single features "
            "by exchange, which ends for a bound above 1. STAT's is 2. Leave it out for heads."
        )
    features = units[:, 0]
    inside = torch.zeros(len(units), dtype=torch.bool, device=G.device)
    inside[kept] = True
    S = G.clone()
    for feature in kept_features(units, kept, len(G)).tolist():
        _pivot(S, feature)
    for _ in range(20 * len(units)):  # a guard against rounding
        size = S[features][:, features].abs()
        size = torch.where(~inside[:, None] & inside, size, 0)
        i, j = divmod(int(size.argmax()), len(units))
        if size[i, j] <= bound:
            break
        _pivot(S, int(features[j]))
        _pivot(S, int(features[i]))
        inside[i], inside[j] = True, False
    return inside.nonzero().flatten()


def _pivot(S: torch.Tensor, p: int) -> None:
    """Principal pivot transform, in place: feature ``p`` enters ``J``, or leaves it.

    ``S`` holds ``G[J, J]⁻¹`` on ``J``, minus the interpolation ``−G[i, J] G[J, J]⁻¹`` in the rows
    of the others, and the Schur complement between them.
    """
    pivot, row, column = S[p, p].clone(), S[p].clone(), S[:, p].clone()
    S.addr_(column, row / pivot, alpha=-1)
    S[p] = row / pivot
    S[:, p] = -column / pivot
    S[p, p] = 1 / pivot
