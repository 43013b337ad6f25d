"""The selections by their names in a recipe."""

from __future__ import annotations

from enum import StrEnum

import torch

from cur_modifier.linalg.checks import (
    at_least_float32,
    require_finite,
    require_matrix,
    require_rank,
)
from cur_modifier.linalg.metric import apply_gram, gram_sqrt
from cur_modifier.linalg.selection.deim import deim
from cur_modifier.linalg.selection.elimination import elimination
from cur_modifier.linalg.selection.greedy import greedy
from cur_modifier.linalg.selection.leverage import leverage_sampled, leverage_top
from cur_modifier.linalg.selection.norm import norm
from cur_modifier.linalg.selection.qdeim import qdeim
from cur_modifier.linalg.selection.random import random
from cur_modifier.linalg.subspace import is_small, leading_subspace, sketched_row_basis

__all__ = ["Selection", "select_rows", "select_rows_and_columns"]


class Selection(StrEnum):
    """The selections by their names in a recipe."""

    DEIM = "deim"
    QDEIM = "qdeim"
    LEVERAGE = "leverage"
    LEVERAGE_SAMPLED = "leverage_sampled"
    GREEDY = "greedy"
    ELIMINATION = "elimination"
    NORM = "norm"
    RANDOM = "random"


_BY_PIVOTS = {Selection.DEIM: deim, Selection.QDEIM: qdeim}
_BY_ERROR = {Selection.GREEDY: greedy, Selection.ELIMINATION: elimination}


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
    matrix ``A`` most; ``elimination`` gives up the one that raises it least. Neither has a use for
    scores.

    Args:
        seed: of ``random``, ``leverage_sampled`` and the sketches.
        gram: ``G (n, n)`` or its diagonal ``(n,)``, for ``greedy`` and ``elimination``.
        outputs: ``H (m, m)`` or its diagonal ``(m,)``, likewise.

    Cost: one :func:`~cur_modifier.linalg.subspace.leading_subspace` and two selections on it;
    ``2 m n r`` flops and two QR of ``(m, r)`` and ``(n, r)`` for ``deim`` and ``qdeim`` on a large
    matrix; two roots and two :func:`~.greedy.greedy` for ``greedy``, two
    :func:`~.elimination.elimination` for that; ``m n`` for ``norm`` and nothing for ``random``.

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
    if kind in _BY_ERROR:
        rows = _by_error(kind, scored, rank, gram, outputs)
        return rows, _by_error(kind, scored.mT, rank, outputs, gram)
    if kind is Selection.NORM:
        return norm(scored, rank), norm(scored.mT, rank)
    if kind in _BY_PIVOTS and not is_small(m, n, rank):
        pivots = _BY_PIVOTS[kind]
        columns = pivots(_turned(sketched_row_basis(scored, rank, generator)))
        return pivots(_turned(torch.linalg.qr(scored[:, columns]).Q)), columns
    subspace = leading_subspace(scored, rank, generator=generator)
    if kind in _BY_PIVOTS:
        return _BY_PIVOTS[kind](subspace.U), _BY_PIVOTS[kind](subspace.V)
    if kind is Selection.LEVERAGE:
        return leverage_top(subspace.U), leverage_top(subspace.V)
    assert kind is Selection.LEVERAGE_SAMPLED
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
    if kind in _BY_ERROR:
        return _by_error(kind, _checked(scored, rank), rank, gram, outputs)
    return select_rows_and_columns(kind, scored, rank, seed=seed)[0]


def _by_error(
    kind: Selection,
    A: torch.Tensor,
    rank: int,
    gram: torch.Tensor | None,
    outputs: torch.Tensor | None,
) -> torch.Tensor:
    """Rows of ``A`` that lower ``‖H^{1/2} (A − Â) G^{1/2}‖_F`` most."""
    A = A.double()
    weighted = A if gram is None else apply_gram(A, gram_sqrt(gram))
    return _BY_ERROR[kind](weighted, rank, outputs)


def _checked(scored: torch.Tensor, rank: int) -> torch.Tensor:
    """A matrix that ``rank`` rows and columns can be chosen of, float32 at least."""
    require_matrix(scored, "the scored matrix")
    require_finite(scored, "the scored matrix")
    m, n = scored.shape
    require_rank(rank, min(m, n), f"a {m}x{n} matrix")
    return at_least_float32(scored)


def _turned(V: torch.Tensor) -> torch.Tensor:
    """Another orthonormal basis of the same subspace, turned towards its rows of highest leverage.

    DEIM's choice depends on the basis. Singular vectors come ordered; a sketch's basis is turned at
    random, and DEIM on it does worse. Here column ``j`` is the direction that the row of ``j``-th
    highest leverage adds, so that DEIM looks at those rows first. Cost: ``2 m r²`` flops.
    """
    return V @ torch.linalg.qr(V[leverage_top(V)].mT).Q
