"""CUR: three factors, two of them made of real rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import FactoredLinear, Write, copy_tensor
from .form import Form

__all__ = ["FORM", "CURLinear"]


class CURLinear(FactoredLinear):
    """``y = C (U (R x)) + b`` with real columns ``C`` and real rows ``R`` of the dense weight.

    Children: ``cur_r`` ``(r, n)``, ``cur_u`` ``(r, r)``, ``cur_c`` ``(m, r)``, which carries the
    bias. Buffers ``rows`` and ``columns`` ``(r,)`` int32 say which rows and columns they are.
    """

    form = "cur"
    free_factor = "cur_u"
    rows: torch.Tensor
    columns: torch.Tensor

    def make_factors(self, bias: bool, **kwargs: Any) -> None:
        n, m, r = self.in_features, self.out_features, self.rank
        self._check_rank(min(m, n))
        self.cur_r = nn.Linear(n, r, bias=False, **kwargs)
        self.cur_u = nn.Linear(r, r, bias=False, **kwargs)
        self.cur_c = nn.Linear(r, m, bias=bias, **kwargs)
        for name in ("rows", "columns"):
            self.register_buffer(name, torch.zeros(r, dtype=torch.int32, device=kwargs["device"]))

    def load_factors(
        self, factors: Any, bias: torch.Tensor | None = None, *, write: Write = copy_tensor
    ) -> None:
        """Store a ``linalg.CUR``."""
        write(self.cur_r, "weight", factors.R)
        write(self.cur_u, "weight", factors.U)
        write(self.cur_c, "weight", factors.C)
        write(self, "rows", factors.rows)
        write(self, "columns", factors.columns)
        if bias is not None:
            write(self.cur_c, "bias", bias)
        self._stand_in = []

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.cur_c(self.cur_u(self.cur_r(x)))

    def dense_weight(self) -> torch.Tensor:
        return self._weight("cur_c") @ (self._weight("cur_u") @ self._weight("cur_r"))

    def effective_bias(self) -> torch.Tensor | None:
        return self.cur_c.bias

    def output_metric(self, factor: str, H: torch.Tensor) -> torch.Tensor | None:
        if factor == "cur_c":
            return None if H.ndim == 1 else H
        C = self._wide("cur_c")
        inner = C.mT @ (H[:, None] * C if H.ndim == 1 else H @ C)
        if factor == "cur_u":
            return inner
        U = self._wide("cur_u")
        return U.mT @ inner @ U

    def input_moment(self, factor: str, G: torch.Tensor) -> torch.Tensor:
        if factor == "cur_r":
            return G
        R = self._wide("cur_r")
        seen = R @ G @ R.mT
        if factor == "cur_u":
            return seen
        U = self._wide("cur_u")
        return U @ seen @ U.mT

    def reorder_outputs(self, sequence: torch.Tensor, *, write: Write = copy_tensor) -> None:
        write(self.cur_c, "weight", self.cur_c.weight.detach()[sequence])
        if self.cur_c.bias is not None:
            write(self.cur_c, "bias", self.cur_c.bias.detach()[sequence])
        write(self, "rows", sequence.argsort()[self.rows.long()].to(self.rows.dtype))

    def reorder_inputs(self, sequence: torch.Tensor, *, write: Write = copy_tensor) -> None:
        super().reorder_inputs(sequence, write=write)
        write(self, "columns", sequence.argsort()[self.columns.long()].to(self.columns.dtype))


class CURForm(Form):
    """``W ≈ C U R`` with real columns and real rows."""

    name = "cur"
    layer = CURLinear
    default_selection = "deim"


FORM = CURForm()
