"""What the factorizations return: the factors, and nothing that computes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CUR", "LowRank", "RowID"]


@dataclass(frozen=True)
class CUR:
    """``W ≈ C U R``: real columns ``C = W[:, columns] (m, r)``, ``U (r, r)``, real rows
    ``R = W[rows, :] (r, n)``."""

    C: torch.Tensor
    U: torch.Tensor
    R: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @property
    def rank(self) -> int:
        return self.U.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of the product."""
        return self.C.shape[0], self.R.shape[1]

    def dense(self) -> torch.Tensor:
        """The product ``(m, n)``."""
        return self.C @ (self.U @ self.R)


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


@dataclass(frozen=True)
class LowRank:
    """``W ≈ A B`` with ``A (m, r)`` and ``B (r, n)``."""

    A: torch.Tensor
    B: torch.Tensor

    @property
    def rank(self) -> int:
        return self.B.shape[0]

    def dense(self) -> torch.Tensor:
        """The product ``(m, n)``."""
        return self.A @ self.B
