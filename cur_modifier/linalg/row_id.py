"""Row interpolative decompositions ``W ≈ P [S; T S]``: of one weight, of several in one order, and
of several that share a skeleton.

Every decomposition takes ``gram``, the inputs' second moment ``G``, in full ``(n, n)``, as a
diagonal ``(n,)``, or None for the plain Frobenius norm, and ``outputs``, a metric ``H`` of the
outputs in full ``(m, m)``, as a diagonal ``(m,)``, or None; it minimises
``‖H^{1/2} (W − Ŵ) G^{1/2}‖_F`` over what it is free to choose. With ``H = E[g gᵀ]`` of the loss's
gradients ``g`` at the outputs this is the loss's second-order growth under the Kronecker
approximation of its curvature (Martens and Grosse 2015). ``H`` must be positive definite. Inputs
are never modified. Results have the dtype of ``W`` (float32 where ``W`` is narrower).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cur_modifier.linalg.checks import prepared, require_finite, require_indices, require_rank
from cur_modifier.linalg.fit import fit_right
from cur_modifier.linalg.low_rank import LowRank, low_rank
from cur_modifier.linalg.pivots import (
    LARGEST_ENTRY,
    common_pivots,
    swapped,
    well_conditioned_pairs,
    well_conditioned_rows,
)
from cur_modifier.linalg.problem import Problem
from cur_modifier.linalg.selection import select_rows
from cur_modifier.linalg.subspace import lstsq

__all__ = [
    "RowID",
    "interpolative",
    "interpolative_aligned",
    "row_id_of_pair",
    "row_ids_in_one_order",
    "solve",
    "solve_together",
    "split_rows",
]


@dataclass(frozen=True)
class RowID:
    """Row interpolative decomposition ``W ≈ P [S; T S]``.

    ``S (r, n)`` is the skeleton, ``T (m − c, r)`` the interpolation matrix, and output ``i`` is row
    ``order[i]`` of the stacked ``[S; T S]``. The other ``c`` outputs are rows of ``S``: all ``r``
    of them, except in a part of a joint decomposition (:func:`split_rows`). Its parts share ``S``,
    each owns ``c`` of its rows as outputs, and ``r`` may exceed ``m``.
    """

    S: torch.Tensor
    T: torch.Tensor
    order: torch.Tensor

    @property
    def rank(self) -> int:
        return self.S.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of the product."""
        return self.order.shape[0], self.S.shape[1]

    @property
    def direct_outputs(self) -> int:
        """How many outputs the skeleton gives directly, ``c``: the rank, unless ``S`` is shared."""
        return self.order.shape[0] - self.T.shape[0]

    @property
    def rows(self) -> torch.Tensor:
        """The outputs ``(c,)`` that the skeleton gives directly, in skeleton order."""
        return torch.argsort(self.order)[: self.direct_outputs]

    def dense(self) -> torch.Tensor:
        """The product ``(m, n)``."""
        return torch.cat([self.S, self.T @ self.S])[self.order]

    def split(self, sizes: Sequence[int]) -> list[RowID]:
        """The row IDs of stacked blocks: see :func:`split_rows`."""
        return split_rows(self, sizes)


def interpolative(
    W: torch.Tensor,
    rank: int,
    gram: torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    noise: float = 0.0,
    outputs: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    blocks: Sequence[tuple[int, int]] | None = None,
) -> RowID:
    """Row ID of ``W``.

    Without ``rows``, the compact form of the optimal rank-``r`` approximation, with the skeleton in
    pairs of neighbouring outputs where :func:`row_id_of_pair` can: no rank-``r`` form has a smaller
    ``‖(W − Ŵ) G^{1/2}‖_F``. With ``rows``, the skeleton is ``W[rows]`` bit for bit and
    ``T = W[rest] G Sᵀ (S G Sᵀ)⁺`` is the best interpolation from it.

    An exact ``T`` may combine skeleton outputs with large weights that cancel; on SmolLM2 its rows
    have norms near 5. If the skeleton is quantized later, its errors do not cancel. With ``noise``,
    the relative error power that ``S x`` will suffer, ``T`` is the best interpolation from the
    noisy skeleton instead.

    With ``outputs``, what the interpolated outputs can do about the error of the skeleton's own is
    part of ``T``; given ``rows`` have no error, and ``H`` changes nothing. With ``target (m, n)``
    and ``rows``, ``T`` interpolates the target's other rows.

    With ``blocks``, ``(m_k, c_k)`` of every one, the rows of ``W`` are stacked blocks and the
    skeleton holds ``c_k`` of each (see :func:`row_id_of_pair`); not with ``rows``, which decide
    that.

    Cost: that of :func:`low_rank` and :func:`row_id_of_pair`; with ``rows`` that of :func:`cur`
    less one QR.

    Raises:
        ValueError: as :func:`low_rank` and :func:`row_id_of_pair`; ``rows`` are not ``rank``
            distinct indices, or come with ``blocks``.
    """
    if rows is None:
        pair = low_rank(W, rank, gram, outputs=outputs)
        exact = row_id_of_pair(pair, blocks=blocks, in_pairs=True)
        return _expecting_noise(exact, W, gram, noise, outputs)
    if blocks is not None:
        raise ValueError(f"got rows and blocks {list(blocks)}; the rows decide which blocks give.")
    W = prepared(W, gram)
    m, n = W.shape
    require_rank(rank, min(m, n), f"a {m}x{n} matrix")
    require_indices(rows, m, "rows")
    if rows.shape != (rank,) or rows.unique().numel() != rank:
        raise ValueError(f"got rows {tuple(rows.shape)}; expected {rank} distinct indices.")
    unchosen = torch.ones(m, dtype=torch.bool, device=W.device)
    unchosen[rows] = False
    rest = unchosen.nonzero().squeeze(1)
    S = W[rows]
    wanted = (W if target is None else target.to(W))[rest]
    T = fit_right(wanted.double(), S.double(), gram, W.dtype, noise)
    return RowID(S=S, T=T.to(W), order=torch.cat([rows, rest]).argsort())


def interpolative_aligned(
    weights: Sequence[torch.Tensor],
    ranks: Sequence[int],
    gram: torch.Tensor | None = None,
    *,
    noise: Sequence[float] | None = None,
    outputs: Sequence[torch.Tensor | None] | None = None,
) -> list[RowID]:
    """Row IDs of weights ``W_k (m, n)`` that read the same inputs, all in one ``order``.

    Each is what :func:`interpolative` makes of it, but for the skeleton, which
    :func:`row_ids_in_one_order` chooses for all. Where that finds none, each has its own, and the
    orders differ.

    Args:
        noise, outputs: as there, one for each weight.

    Cost: that of :func:`low_rank` for each, and of :func:`row_ids_in_one_order`.

    Raises:
        ValueError: as :func:`low_rank` and :func:`row_ids_in_one_order`.
    """
    metrics = [None] * len(weights) if outputs is None else outputs
    noises = [0.0] * len(weights) if noise is None else noise
    pairs = [
        low_rank(W, rank, gram, outputs=H)
        for W, rank, H in zip(weights, ranks, metrics, strict=True)
    ]
    exact = row_ids_in_one_order(pairs) or [row_id_of_pair(pair, in_pairs=True) for pair in pairs]
    return [
        _expecting_noise(one, W, gram, level, H)
        for one, W, level, H in zip(exact, weights, noises, metrics, strict=True)
    ]


def _expecting_noise(
    exact: RowID,
    W: torch.Tensor,
    gram: torch.Tensor | None,
    noise: float,
    outputs: torch.Tensor | None,
) -> RowID:
    """The row ID with the ``T`` that serves best behind a skeleton that ``noise`` has changed."""
    if not noise:
        return exact
    chosen, rest = torch.argsort(exact.order).tensor_split([exact.rank])
    W = prepared(W, gram).double()
    target = W[rest]
    if outputs is not None and outputs.ndim == 2:
        H = outputs.to(W)
        missed = H[rest][:, chosen] @ (W[chosen] - exact.S.double())
        target = target + torch.linalg.solve(H[rest][:, rest], missed)
    T = fit_right(target, exact.S.double(), gram, exact.S.dtype, noise)
    return replace(exact, T=T.to(exact.S))


def row_id_of_pair(
    pair: LowRank,
    *,
    max_entry: float = 2.0,
    blocks: Sequence[tuple[int, int]] | None = None,
    in_pairs: bool = False,
) -> RowID:
    """A low-rank pair as a row ID, without loss: ``S = A[I] B``, ``T = A[rest] A[I]⁻¹``.

    It stores ``r (m + n − r)`` numbers where the pair stores ``r (m + n)``. The rows ``I`` start
    from LU pivots of ``A`` and are swapped until no entry of ``T`` exceeds ``max_entry`` in
    magnitude: large entries would cancel in low precision.

    With ``blocks`` the rows are stacked blocks, each of which gives the skeleton a fixed number of
    rows. The pivots are then first swapped between blocks, by the largest entries of ``T`` first,
    until every block gives its number, and after that only within blocks. So only those entries of
    ``T`` that interpolate an output from skeleton rows of its own block keep the bound; the others
    have none. Where a block has fewer independent rows than it has to give, no such rows need span
    those of ``A``: ``T`` is then the least-squares interpolation, and there is a loss.

    ``in_pairs`` chooses rows ``2i`` and ``2i + 1`` together, so that the outputs can be put in
    order two at a time: two 16-bit numbers are one word, and gathering words costs a tenth of
    gathering halves (CPU, 256 tokens). The pivots of LU are then 2×2, the swaps for a larger
    ``|det A[I]|``. On SmolLM2 that leaves ``max |T|`` at 2 to 4 and the norms of its rows within a
    tenth of what single rows give. Where an entry above 8 remains, or the number of rows, the rank
    or a block is odd, single rows are chosen.

    Args:
        max_entry: bound on ``max |T|`` of single rows, above 1. Each swap grows ``|det A[I]|`` by
            at least this.
        blocks: ``(m_k, c_k)`` of every block, top to bottom: its rows, and how many of them are to
            be in the skeleton. They add up to ``m`` and ``r``.

    Cost: ``2 m r²`` flops and ``2 (m − r) r`` a swap; twice that for pairs.

    Source: Cheng, Gimbutas, Martinsson, Rokhlin 2005; the swaps are those of Goreinov et al. 2010
    (maxvol) and of Gu and Eisenstat 1996.

    Raises:
        ValueError: a factor is not finite, the left one is wide, ``max_entry`` is not above 1, or
            the blocks do not fit.
    """
    _require_row_id(pair)
    if not max_entry > 1:
        raise ValueError(f"max_entry is {max_entry}; swapping rows terminates only above 1.")
    if blocks is not None:
        _require_blocks(blocks, *pair.A.shape)
    A = pair.A.double()
    counts = [*A.shape, *(count for block in blocks or () for count in block)]
    found = None
    if in_pairs and not any(count % 2 for count in counts):
        found = well_conditioned_pairs(A, blocks)
    return _on_rows(pair, *(found or well_conditioned_rows(A, max_entry, blocks)))


def row_ids_in_one_order(pairs: Sequence[LowRank]) -> list[RowID] | None:
    """Low-rank pairs with equally many outputs as row IDs of one ``order``, without loss.

    Of one sequence of the ``m`` rows the first ``r_k`` are the skeleton of pair ``k``, so skeletons
    of different ranks are nested. Where the outputs of all pairs are features that can be put in
    any order together, as the neurons of an MLP, they are put in that sequence, and nothing is left
    to be gathered when the model runs.

    The sequence starts from LU pivots that are large in all left factors ``A_k`` at once, and rows
    are swapped while the product of all ``|det A_k[I_k]|`` grows. On SmolLM2's gate and up (layers
    0, 5, 20, 29) that leaves ``max |T|`` between 1.5 and 3.7, and pivots of each one's own between
    1.7 and 3.6; the norms of T's rows are within a ninth of each other.

    Returns:
        The row IDs, or None where some ``A_k`` has no full rank or an entry of some ``T`` is above
        8, which would cancel in low precision.

    Cost: for each pair ``2 m r²`` flops, and ``2 m r`` a swap.

    Raises:
        ValueError: no pairs, or of different numbers of outputs; a factor is not finite or wide.
    """
    _require_alike(pairs)
    factors = [pair.A.double() for pair in pairs]
    sequence = common_pivots(factors)
    if sequence is None:
        return None
    sequence = swapped(factors, sequence)
    found = [_on_rows(pair, *sequence.tensor_split([pair.A.shape[1]])) for pair in pairs]
    entries = [float(one.T.abs().max()) for one in found if one.T.numel()]
    return None if max(entries, default=0.0) > LARGEST_ENTRY else found


def split_rows(joint: RowID, sizes: Sequence[int]) -> list[RowID]:
    """A row ID of stacked weights ``[W_1; W_2; …] (m, n)`` as the row IDs of its blocks.

    All parts hold the same tensor ``S (r, n)``. Part ``k`` with ``m_k`` outputs owns ``c_k`` of its
    rows as outputs; it has ``T (m_k − c_k, r)``, the rows of the joint ``T`` for its other outputs,
    in the order of the outputs, and ``order (m_k,)``. The products of the parts, stacked, are the
    joint product. Stored once, ``S`` and all ``T`` are the ``r (m + n − r)`` numbers of the joint
    form.

    Args:
        sizes: ``m_k`` of every block, top to bottom.

    Cost: a copy of ``T``.

    Raises:
        ValueError: the sizes are not positive, or their sum is not ``m``.
    """
    m = joint.shape[0]
    if not sizes or min(sizes) < 1 or sum(sizes) != m:
        raise ValueError(
            f"blocks of {list(sizes)} rows do not stack to the {m} rows of the joint weight. Give "
            "the number of outputs of every block, in the order in which they were stacked."
        )
    parts = []
    for order in joint.order.split(list(sizes)):
        interpolated = order >= joint.rank
        T = joint.T[order[interpolated] - joint.rank]
        place = joint.rank + interpolated.cumsum(0) - 1
        parts.append(RowID(S=joint.S, T=T, order=torch.where(interpolated, place, order)))
    return parts


def _on_rows(pair: LowRank, chosen: torch.Tensor, rest: torch.Tensor) -> RowID:
    """The pair as a row ID whose skeleton is made of the rows ``chosen`` of ``A``."""
    A = pair.A.double()
    T = lstsq(A[chosen].mT, A[rest].mT).mT
    S = A[chosen] @ pair.B.double()
    return RowID(S=S.to(pair.B), T=T.to(pair.B), order=torch.cat([chosen, rest]).argsort())


def _require_row_id(pair: LowRank) -> None:
    """Raises:
    ValueError: the pair is no row ID of its rank: the left factor is wide, or one not finite.
    """
    if pair.A.shape[0] < pair.A.shape[1]:
        raise ValueError(
            f"the left factor has shape {tuple(pair.A.shape)}; a row ID needs at least as many "
            "rows as the rank. Lower the rank."
        )
    require_finite(pair.A, "the left factor")
    require_finite(pair.B, "the right factor")


def _require_blocks(blocks: Sequence[tuple[int, int]], m: int, rank: int) -> None:
    sizes, quotas = [size for size, _ in blocks], [quota for _, quota in blocks]
    if sum(sizes) != m or sum(quotas) != rank:
        raise ValueError(
            f"blocks of {sizes} rows that give {quotas} of them make {sum(sizes)} rows and rank "
            f"{sum(quotas)}; the left factor has {m} rows and rank {rank}."
        )
    if any(not 0 <= quota <= size for size, quota in blocks):
        raise ValueError(
            f"blocks of {sizes} rows can't give {quotas} of them: each gives between 0 and all."
        )


def _require_alike(pairs: Sequence[LowRank]) -> None:
    heights = {len(pair.A) for pair in pairs}
    if len(heights) != 1:
        raise ValueError(
            f"got {len(pairs)} pairs with {sorted(heights)} outputs; one order needs at least one "
            "pair, and equally many outputs in all of them."
        )
    for pair in pairs:
        _require_row_id(pair)


def solve(problem: Problem) -> RowID:
    """A row ID on the rows that the problem's selection chooses; without one, the compact form of
    the optimal approximation.

    Raises:
        ValueError: as :func:`interpolative` and the selection.
    """
    p = problem
    if p.selection is None:
        return interpolative(
            p.wanted, p.rank, p.gram, noise=p.noise, outputs=p.outputs, blocks=p.blocks
        )
    rows = select_rows(p.selection, p.scored, p.rank, seed=p.seed, gram=p.gram, outputs=p.outputs)
    return interpolative(p.W, p.rank, p.gram, rows=rows, noise=p.noise, target=p.target)


def solve_together(problems: Sequence[Problem]) -> list[RowID]:
    """Row IDs, without selection, of weights that read the same inputs: the outputs of all in one
    order where that is safe.

    Raises:
        ValueError: as :func:`interpolative_aligned`.
    """
    return interpolative_aligned(
        [p.wanted for p in problems],
        [p.rank for p in problems],
        problems[0].gram,
        noise=[p.noise for p in problems],
        outputs=[p.outputs for p in problems],
    )
