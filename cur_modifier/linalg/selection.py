"""Which rows to keep: selections on an orthonormal basis or on the scored matrix itself.

All return ``r`` distinct row indices as an int64 tensor, in the order of choice. For columns pass
the transpose. One function a method, chosen by the enum :class:`Selection`.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from scipy.linalg import qr as scipy_qr

from cur_modifier.linalg.checks import (
    at_least_float32,
    require_finite,
    require_matrix,
    require_rank,
)
from cur_modifier.linalg.gram import apply_gram, gram_sqrt
from cur_modifier.linalg.greedy import greedy
from cur_modifier.linalg.subspace import is_small, leading_subspace, sketched_row_basis

__all__ = [
    "Selection",
    "deim",
    "leverage_sampled",
    "leverage_scores",
    "leverage_top",
    "norm",
    "qdeim",
    "random",
    "select_rows",
    "select_rows_and_columns",
]


class Selection(StrEnum):
    """The selections by their names in a recipe."""

    DEIM = "deim"
    QDEIM = "qdeim"
    LEVERAGE = "leverage"
    LEVERAGE_SAMPLED = "leverage_sampled"
    GREEDY = "greedy"
    NORM = "norm"
    RANDOM = "random"


def deim(V: torch.Tensor) -> torch.Tensor:
    """DEIM indices ``(r,)`` of a basis ``V (m, r)``: one index a column, greedily.

    The textbook loop picks, for column ``j``, the largest entry of the residual of interpolating it
    by the columns before. That residual is the Schur complement of Gaussian elimination, so the
    indices are the row pivots of LU with partial pivoting of ``V``: one call.

    Cost: ``m r²`` flops.

    Source: Chaturantabut and Sorensen 2010, algorithm 1; Sorensen and Embree 2016, section 3.
    """
    _require_basis(V)
    pivots = torch.linalg.lu_factor_ex(at_least_float32(V)).pivots.tolist()
    order = list(range(V.shape[0]))
    for step, pivot in enumerate(pivots):  # LAPACK records row swaps, one-based
        order[step], order[pivot - 1] = order[pivot - 1], order[step]
    return torch.tensor(order[: V.shape[1]], device=V.device)


def qdeim(V: torch.Tensor) -> torch.Tensor:
    """Q-DEIM indices ``(r,)`` of ``V (m, r)``: column pivots of QR of ``Vᵀ``.

    Independent of the basis chosen for the subspace, with a sharper error constant than DEIM.
    Runs on the CPU (LAPACK ``geqp3``). Cost: ``2 m r²`` flops.

    Source: Drmač and Gugercin 2016.
    """
    _require_basis(V)
    transposed = at_least_float32(V).mT.cpu().numpy()
    _, pivots = scipy_qr(transposed, mode="r", pivoting=True, check_finite=False)
    return torch.as_tensor(pivots[: V.shape[1]].astype("int64"), device=V.device)


def leverage_scores(V: torch.Tensor) -> torch.Tensor:
    """Leverage ``ℓ_i = ‖V[i, :]‖²`` of every row of an orthonormal ``V (m, r)``; they sum to ``r``.

    Source: Mahoney and Drineas 2009.
    """
    _require_basis(V)
    return at_least_float32(V).square().sum(dim=1)


def leverage_top(V: torch.Tensor) -> torch.Tensor:
    """The ``r`` rows of ``V (m, r)`` of highest leverage, ties by index."""
    return _top(leverage_scores(V), V.shape[1])


def leverage_sampled(V: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``r`` distinct rows of ``V (m, r)``, drawn with probability proportional to leverage.

    Source: Mahoney and Drineas 2009, section 2, without replacement.
    """
    # A floor keeps enough rows drawable when fewer than r have any leverage.
    weights = leverage_scores(V).double().cpu() + torch.finfo(torch.float32).tiny
    return torch.multinomial(weights, V.shape[1], generator=generator).to(V.device)


def norm(A: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` rows of ``A (m, n)`` of largest Euclidean norm, ties by index."""
    require_matrix(A, "the scored matrix")
    require_finite(A, "the scored matrix")
    require_rank(count, A.shape[0], f"a matrix of {A.shape[0]} rows")
    return _top(torch.linalg.vector_norm(at_least_float32(A), dim=1), count)


def random(length: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` of ``length`` indices, uniformly without replacement: the control."""
    require_rank(count, length, f"{length} rows")
    return torch.randperm(length, generator=generator)[:count]


_BY_PIVOTS = {Selection.DEIM: deim, Selection.QDEIM: qdeim}


def select_rows_and_columns(
    kind: Selection,
    scored: torch.Tensor,
    rank: int,
    *,
    seed: int = 0,
    gram: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rank`` row and ``rank`` column indices of a scored matrix ``(m, n)``.

    The same inputs and seed give the same indices on every rank of a distributed run.

    ``deim`` and ``qdeim`` select on the singular vectors of a small matrix. On a large one they
    take the columns from a sketch of the row space, and then the rows from an orthonormal basis of
    those very columns: one pass over the matrix, and rows that fit the columns they will meet.

    ``greedy`` adds the row, and the column, that lowers ``‖H^{1/2} (A − Â) G^{1/2}‖_F`` of the
    matrix ``A`` most, and has no use for scores.

    Args:
        seed: of ``random``, ``leverage_sampled`` and the sketches.
        gram: ``G (n, n)`` or its diagonal ``(n,)``, for ``greedy``.
        outputs: ``H (m, m)`` or its diagonal ``(m,)``, for ``greedy``.

    Cost: one :func:`~cur_modifier.linalg.subspace.leading_subspace` and two selections on it;
    ``2 m n r`` flops and two QR of ``(m, r)`` and ``(n, r)`` for ``deim`` and ``qdeim`` on a large
    matrix; two roots and two :func:`~cur_modifier.linalg.greedy.greedy` for ``greedy``; ``m n``
    for ``norm`` and nothing for ``random``.

    Source: Sorensen and Embree 2016 (singular vectors); Dong and Martinsson 2023 (columns from a
    sketch, rows from the columns).

    Raises:
        ValueError: the matrix is not finite, or the rank is outside ``1..min(m, n)``.
    """
    scored = _checked(scored, rank)
    m, n = scored.shape
    generator = torch.Generator().manual_seed(seed)
    if kind is Selection.RANDOM:
        rows, columns = random(m, rank, generator), random(n, rank, generator)
        return rows.to(scored.device), columns.to(scored.device)
    if kind is Selection.GREEDY:
        return _greedy(scored, rank, gram, outputs), _greedy(scored.mT, rank, outputs, gram)
    if kind is Selection.NORM:
        return norm(scored, rank), norm(scored.mT, rank)
    if kind in _BY_PIVOTS and not is_small(m, n, rank):
        pivots = _BY_PIVOTS[kind]
        columns = pivots(_aligned(sketched_row_basis(scored, rank, generator)))
        return pivots(_aligned(torch.linalg.qr(scored[:, columns]).Q)), columns
    subspace = leading_subspace(scored, rank, generator=generator)
    match kind:
        case Selection.DEIM | Selection.QDEIM:
            return _BY_PIVOTS[kind](subspace.U), _BY_PIVOTS[kind](subspace.V)
        case Selection.LEVERAGE:
            return leverage_top(subspace.U), leverage_top(subspace.V)
        case Selection.LEVERAGE_SAMPLED:
            return leverage_sampled(subspace.U, generator), leverage_sampled(subspace.V, generator)


def select_rows(
    kind: Selection,
    scored: torch.Tensor,
    rank: int,
    *,
    seed: int = 0,
    gram: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rows alone, for a row ID: those of :func:`select_rows_and_columns`.

    Cost: half of it for ``greedy``, which chooses each side by itself.

    Raises:
        ValueError: as there.
    """
    if kind is Selection.GREEDY:
        return _greedy(_checked(scored, rank), rank, gram, outputs)
    return select_rows_and_columns(kind, scored, rank, seed=seed)[0]


def _greedy(
    A: torch.Tensor, rank: int, gram: torch.Tensor | None, outputs: torch.Tensor | None
) -> torch.Tensor:
    """Rows of ``A`` that lower ``‖H^{1/2} (A − Â) G^{1/2}‖_F`` most."""
    A = A.double()
    return greedy(A if gram is None else apply_gram(A, gram_sqrt(gram)), rank, outputs)


def _checked(scored: torch.Tensor, rank: int) -> torch.Tensor:
    """A matrix that ``rank`` rows and columns can be chosen of, float32 at least."""
    require_matrix(scored, "the scored matrix")
    require_finite(scored, "the scored matrix")
    m, n = scored.shape
    require_rank(rank, min(m, n), f"a {m}x{n} matrix")
    return at_least_float32(scored)


def _aligned(V: torch.Tensor) -> torch.Tensor:
    """Another orthonormal basis of the same subspace, turned towards its rows of highest leverage.

    DEIM's choice depends on the basis. Singular vectors come ordered; a sketch's basis is turned at
    random, and DEIM on it does worse. Here column ``j`` is the direction that the row of ``j``-th
    highest leverage adds, so that DEIM looks at those rows first. Cost: ``2 m r²`` flops.
    """
    return V @ torch.linalg.qr(V[leverage_top(V)].mT).Q


def _top(values: torch.Tensor, count: int) -> torch.Tensor:
    return torch.sort(values, descending=True, stable=True).indices[:count]


def _require_basis(V: torch.Tensor) -> None:
    require_matrix(V, "the basis")
    require_finite(V, "the basis")
    if V.shape[1] > V.shape[0]:
        raise ValueError(
            f"the basis has shape {tuple(V.shape)}; expected at least as many rows as columns. "
            "Pass the transpose."
        )
