"""Factorizations of a weight ``W (m, n)``, fitted to its inputs' second moment ``G (n, n)``.

Every routine takes ``gram`` in full ``(n, n)``, as a diagonal ``(n,)``, or None for the plain
Frobenius norm, and ``outputs``, a metric ``H`` of the outputs in full ``(m, m)``, as a diagonal
``(m,)``, or None; it minimises ``‖H^{1/2} (W − Ŵ) G^{1/2}‖_F`` over what it is free to choose. With
``H = E[g gᵀ]`` of the loss's gradients ``g`` at the outputs this is the loss's second-order growth
under the Kronecker approximation of its curvature (Martens and Grosse 2015). ``H`` must be positive
definite. Inputs are never modified. Results have the dtype of ``W`` (float32 where ``W`` is
narrower).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cur_modifier.linalg.aligned import aligned
from cur_modifier.linalg.checks import (
    at_least_float32,
    require_finite,
    require_gram,
    require_indices,
    require_matrix,
    require_rank,
)
from cur_modifier.linalg.compact import compact, stacking_order
from cur_modifier.linalg.fit import fit_right, solve
from cur_modifier.linalg.forms import CUR, LowRank, RowID
from cur_modifier.linalg.gram import apply_gram, gram_sqrt

__all__ = ["cur", "interpolative", "interpolative_aligned", "low_rank"]

# Up to this short side a full eigh takes less than a second.
_EXACT_SIDE = 1024
_SUBSPACE_ITERATIONS = 4


def cur(
    W: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    gram: torch.Tensor | None = None,
    *,
    outputs: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
) -> CUR:
    """CUR with given rows and columns and the best core for them.

    ``U = C⁺ W G Rᵀ (R G Rᵀ)⁺`` minimises ``‖(W − C U R) G^{1/2}‖_F``; without ``gram`` it is
    ``C⁺ W R⁺``. Repeated or dependent rows and columns are handled (minimum-norm ``U``).

    Args:
        W: ``(m, n)``.
        rows, columns: ``r`` indices each.
        gram: ``G``.
        outputs: ``H``.
        target: ``(m, n)``, what the product shall be close to where that is not ``W``, whose rows
            and columns it is made of (:func:`cur_modifier.linalg.anchored_target`).

    Cost: ``2 m n r`` flops and QR of ``(m, r)`` and ``(n, r)``; with a full ``G`` another
    ``2 n² r``, in float64.

    Source: Sorensen and Embree 2016 (the plain core). Under activations it is the same least
    squares, of ``W G^{1/2}`` by ``C`` and ``R G^{1/2}``.

    Raises:
        ValueError: ``W`` or ``gram`` is not finite or does not fit, or rows and columns differ in
            number or lie outside ``W``.
    """
    W = _prepared(W, gram)
    if rows.shape != columns.shape or rows.ndim != 1:
        raise ValueError(
            f"got {tuple(rows.shape)} rows and {tuple(columns.shape)} columns; "
            "CUR takes equally many of both, as 1-D index tensors."
        )
    require_indices(rows, W.shape[0], "rows")
    require_indices(columns, W.shape[1], "columns")
    C, R = W[:, columns], W[rows, :]
    if gram is None and outputs is None and target is None:
        U = solve(R.mT, solve(C, W, W.dtype).mT, W.dtype).mT
    else:
        wanted = W if target is None else target
        right = fit_right(wanted.double(), R.double(), gram, W.dtype)
        left, right = (_weighted(outputs, side) for side in (C.double(), right))
        U = solve(left, right, W.dtype)
    return CUR(C=C, U=U.to(W), R=R, rows=rows, columns=columns)


def low_rank(
    W: torch.Tensor,
    rank: int,
    gram: torch.Tensor | None = None,
    *,
    outputs: torch.Tensor | None = None,
    exact: bool | None = None,
) -> LowRank:
    """The best rank-``r`` approximation under ``G`` and ``H``: ``Ŵ = L⁻ᵀ Q Qᵀ Lᵀ W``.

    ``Q`` holds the leading eigenvectors of ``Lᵀ W G Wᵀ L`` and ``H = L Lᵀ``, so no square root of
    ``G`` is inverted. Without both ``L = I`` and this is the truncated SVD.

    Args:
        outputs: ``H``.
        exact: use a full ``eigh`` (True) or subspace iteration (False). By default the latter only
            where the short side exceeds 1024 and the rank is at most a quarter of it; its error is
            then within a fraction of a percent of the optimum.

    Cost, float64: ``2 m n (m + n) + 9 m³`` flops for ``m ≤ 1.26 n``; else two ``eigh`` of
    ``(n, n)``; ``5 (4 m n + 2 n²) r`` by subspace iteration. A full ``H`` adds ``m³/3`` and
    ``2 m² (n + r)``. Squaring ``W`` on the way, it resolves
    singular values down to about 1e-8 of the largest.

    Source: Eckart and Young 1936 applied to ``W G^{1/2}``.

    Raises:
        ValueError: ``W`` or ``gram`` is not finite or does not fit, or the rank is outside
            ``1..min(m, n)``.
    """
    W = _prepared(W, gram)
    m, n = W.shape
    require_rank(rank, min(m, n), f"a {m}x{n} matrix")
    if exact is None:
        exact = min(m, n) <= _EXACT_SIDE or 4 * rank > min(m, n)
    wide = _weighted(outputs, W.double())
    Q = _leading_left_exact(wide, rank, gram) if exact else _leading_left_iterated(wide, rank, gram)
    return LowRank(A=_unweighted(outputs, Q).to(W), B=(Q.mT @ wide).to(W))


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
    pairs of neighbouring outputs where :func:`compact` can: no rank-``r`` form has a smaller
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
    skeleton holds ``c_k`` of each (see :func:`compact`); not with ``rows``, which decide that.

    Cost: that of :func:`low_rank` and :func:`compact`; with ``rows`` that of :func:`cur` less one
    QR.

    Raises:
        ValueError: as :func:`low_rank` and :func:`compact`; ``rows`` are not ``rank`` distinct
            indices, or come with ``blocks``.
    """
    if rows is None:
        pair = low_rank(W, rank, gram, outputs=outputs)
        exact = compact(pair, blocks=blocks, in_pairs=True)
        return _expecting_noise(exact, W, gram, noise, outputs)
    if blocks is not None:
        raise ValueError(f"got rows and blocks {list(blocks)}; the rows decide which blocks give.")
    W = _prepared(W, gram)
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
    return RowID(S=S, T=T.to(W), order=stacking_order(rows, rest))


def interpolative_aligned(
    weights: Sequence[torch.Tensor],
    ranks: Sequence[int],
    gram: torch.Tensor | None = None,
    *,
    noise: Sequence[float] | None = None,
    outputs: Sequence[torch.Tensor | None] | None = None,
) -> list[RowID]:
    """Row IDs of weights ``W_k (m, n)`` that read the same inputs, all in one ``order``.

    Each is what :func:`interpolative` makes of it, but for the skeleton, which :func:`aligned`
    chooses for all. Where that finds none, each has its own, and the orders differ.

    Args:
        noise, outputs: as there, one for each weight.

    Cost: that of :func:`low_rank` for each, and of :func:`aligned`.

    Raises:
        ValueError: as :func:`low_rank` and :func:`aligned`.
    """
    metrics = [None] * len(weights) if outputs is None else outputs
    noises = [0.0] * len(weights) if noise is None else noise
    pairs = [
        low_rank(W, rank, gram, outputs=H)
        for W, rank, H in zip(weights, ranks, metrics, strict=True)
    ]
    exact = aligned(pairs) or [compact(pair, in_pairs=True) for pair in pairs]
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
    W = _prepared(W, gram).double()
    target = W[rest]
    if outputs is not None and outputs.ndim == 2:
        H = outputs.to(W)
        missed = H[rest][:, chosen] @ (W[chosen] - exact.S.double())
        target = target + torch.linalg.solve(H[rest][:, rest], missed)
    T = fit_right(target, exact.S.double(), gram, exact.S.dtype, noise)
    return replace(exact, T=T.to(exact.S))


def _weighted(outputs: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """``Lᵀ M`` for ``H = L Lᵀ``; ``M`` itself without ``H``."""
    if outputs is None:
        return matrix
    root = _root(outputs, matrix)
    return root[:, None] * matrix if root.ndim == 1 else root.mT @ matrix


def _unweighted(outputs: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """``L⁻ᵀ M``, the inverse of :func:`_weighted`."""
    if outputs is None:
        return matrix
    root = _root(outputs, matrix)
    if root.ndim == 1:
        return matrix / root[:, None]
    return torch.linalg.solve_triangular(root.mT, matrix, upper=True)


def _root(outputs: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    m = like.shape[0]
    if outputs.shape not in {(m, m), (m,)}:
        raise ValueError(
            f"the metric of the outputs has shape {tuple(outputs.shape)}; expected ({m}, {m}) or "
            f"its diagonal ({m},)."
        )
    if outputs.ndim == 1:
        root, failed = outputs.to(like).sqrt(), bool((outputs <= 0).any())
    else:
        root, info = torch.linalg.cholesky_ex(outputs.to(like))
        failed = bool(info)
    if failed or not bool(torch.isfinite(root).all()):
        raise ValueError(
            "the metric of the outputs is not positive definite. Add a share of its mean diagonal "
            "to the diagonal."
        )
    return root


def _prepared(W: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    require_matrix(W, "the weight")
    require_finite(W, "the weight")
    if gram is not None:
        require_gram(gram, W.shape[1])
    return at_least_float32(W.detach())


def _leading_left_exact(W: torch.Tensor, rank: int, gram: torch.Tensor | None) -> torch.Tensor:
    m, n = W.shape
    if m**3 <= 2 * n**3:  # one eigh of m x m is cheaper than two of n x n
        moment = W @ (W if gram is None else apply_gram(W, gram)).mT
        return torch.linalg.eigh((moment + moment.mT) / 2).eigenvectors[:, -rank:].flip(1)
    image = W if gram is None else apply_gram(W, gram_sqrt(gram))
    right = torch.linalg.eigh(image.mT @ image).eigenvectors[:, -rank:].flip(1)
    # QR instead of a division by singular values: some of them may be zero.
    return torch.linalg.qr(image @ right).Q


def _leading_left_iterated(W: torch.Tensor, rank: int, gram: torch.Tensor | None) -> torch.Tensor:
    width = min(rank + 32, *W.shape)
    start = torch.randn(W.shape[0], width, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(start.to(W)).Q
    for _ in range(_SUBSPACE_ITERATIONS):
        back = W.mT @ Q
        Q = torch.linalg.qr(W @ (back if gram is None else apply_gram(back.mT, gram).mT)).Q
    projected = Q.mT @ W
    moment = projected @ (projected if gram is None else apply_gram(projected, gram)).mT
    return Q @ torch.linalg.eigh((moment + moment.mT) / 2).eigenvectors[:, -rank:].flip(1)
