"""Plain low-rank pairs: two factors, neither made of real rows or columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import FactoredLinear, Write, copy_tensor
from .form import Form

__all__ = ["FORM", "LowRankLinear"]


class LowRankLinear(FactoredLinear):
    """``y = A (B x) + b``.

    Children: ``lr_b`` ``(r, n)`` and ``lr_a`` ``(m, r)``, which carries the bias.
    """

    form = "low_rank"
    free_factor = "lr_a"

    def make_factors(self, bias: bool, **kwargs: Any) -> None:
        n, m, r = self.in_features, self.out_features, self.rank
        self._check_rank(min(m, n))
        self.lr_b = nn.Linear(n, r, bias=False, **kwargs)
        self.lr_a = nn.Linear(r, m, bias=bias, **kwargs)

    def load_factors(
        self, factors: Any, bias: torch.Tensor | None = None, *, write: Write = copy_tensor
    ) -> None:
        """Store a ``linalg.LowRank``."""
        write(self.lr_b, "weight", factors.B)
        write(self.lr_a, "weight", factors.A)
        if bias is not None:
            write(self.lr_a, "bias", bias)
        self._stand_in = []

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.lr_a(self.lr_b(x))

    def dense_weight(self) -> torch.Tensor:
        return self._weight("lr_a") @ self._weight("lr_b")

    def effective_bias(self) -> torch.Tensor | None:
        return self.lr_a.bias

    def output_metric(self, factor: str, H: torch.Tensor) -> torch.Tensor | None:
        if factor == "lr_a":
            return None if H.ndim == 1 else H
        A = self._wide("lr_a")
        return A.mT @ (H[:, None] * A if H.ndim == 1 else H @ A)

    def input_moment(self, factor: str, G: torch.Tensor) -> torch.Tensor:
        if factor == "lr_b":
            return G
        B = self._wide("lr_b")
        return B @ G @ B.mT

    def reorder_outputs(self, sequence: torch.Tensor, *, write: Write = copy_tensor) -> None:
        write(self.lr_a, "weight", self.lr_a.weight.detach()[sequence])
        if self.lr_a.bias is not None:
            write(self.lr_a, "bias", self.lr_a.bias.detach()[sequence])


class LowRankForm(Form):
    """``W ≈ A B``, as SVD-LLM and its kin publish it."""

    name = "low_rank"
    layer = LowRankLinear
    selects = False

    def of_pair(self, pair: Any) -> Any:
        return pair


FORM = LowRankForm()
