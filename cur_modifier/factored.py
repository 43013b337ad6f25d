"""Linear layers stored as products of small matrices.

The factors are ordinary ``nn.Linear`` children, so that every other stage of a recipe (GPTQ,
SparseGPT, round-to-nearest) sees them, calibrates them on what really flows through them, and packs
them as it packs any Linear. The containers are not ``nn.Linear`` themselves: a stage that targets
``Linear`` reaches the factors and nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

if TYPE_CHECKING:
    from cur_modifier.linalg import CUR, RowID

__all__ = ["FACTORED_CLASSES", "CURLinear", "FactoredLinear", "InterpolativeLinear"]

Write = Callable[[nn.Module, str, torch.Tensor], None]
"""Stores a tensor under a parameter's or buffer's name. Offloaded modules need their own."""


def copy_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """The plain :data:`Write`: copies in place, keeping device and dtype."""
    with torch.no_grad():
        getattr(module, name).copy_(value)


class FactoredLinear(nn.Module):
    """What both forms share: sizes, the way back to a dense layer, and a stand-in before the fit.

    Attributes:
        in_features, out_features, rank: ``n``, ``m``, ``r``.
        form: the storage form, "cur" or "id".
        factor_names: names of the ``nn.Linear`` children, in the order they are applied.
    """

    form: str
    factor_names: tuple[str, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        limit = min(in_features, out_features)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"rank {rank} is outside 1..{limit} for a {out_features}x{in_features} layer."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        # A one-element list hides the dense layer from `named_modules`: followers must not see it.
        self._stand_in: list[nn.Linear] = []
        self.make_factors(bias, device=device, dtype=dtype)

    def make_factors(self, bias: bool, **kwargs: Any) -> None:
        """Make the children and buffers, with ``device`` and ``dtype`` of the factors.

        Raises:
            ValueError: the form has no such rank.
        """
        raise NotImplementedError

    @classmethod
    def from_factors(
        cls,
        factors: CUR | RowID,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer holding ``factors``, on their device and in their dtype unless told otherwise."""
        m, n = factors.shape
        like = next(iter(vars(factors).values()))
        layer = cls(
            n,
            m,
            factors.rank,
            bias=bias is not None,
            device=like.device,
            dtype=dtype or like.dtype,
        )
        layer.load_factors(factors, bias)
        return layer

    @property
    def factors(self) -> dict[str, nn.Linear]:
        """The ``nn.Linear`` children by name."""
        return {name: self.get_submodule(name) for name in self.factor_names}  # type: ignore[misc]

    def stand_in(self, dense: nn.Linear) -> None:
        """Answer with ``dense`` until :meth:`load_factors`: the factors are not fitted yet."""
        self._stand_in = [dense]

    @property
    def dense(self) -> nn.Linear | None:
        """The dense layer that answers for unfitted factors, if any."""
        return self._stand_in[0] if self._stand_in else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., n)`` to ``(..., m)``."""
        if self._stand_in:
            return self._stand_in[0](x)
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The forward pass through the factors."""
        raise NotImplementedError

    def load_factors(
        self, factors: Any, bias: torch.Tensor | None = None, *, write: Write = copy_tensor
    ) -> None:
        """Store ``factors`` of the class's form and stop answering with the dense stand-in."""
        raise NotImplementedError

    def dense_weight(self) -> torch.Tensor:
        """The product of the factors, ``(m, n)``, in float32 or wider."""
        raise NotImplementedError

    def to_dense(self) -> nn.Linear:
        """One ``nn.Linear`` with the product of the factors as its weight.

        Raises:
            ValueError: the factors are packed by a quantized format; run one forward pass of the
                model first, which unpacks them.
        """
        bias = self.effective_bias()
        weight = self.dense_weight()
        first = next(self.parameters())
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=bias is not None,
            device=first.device,
            dtype=first.dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(weight)
            if bias is not None:
                dense.bias.copy_(bias)
        return dense

    def effective_bias(self) -> torch.Tensor | None:
        """The bias ``(m,)`` in the order of the outputs, or None."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    def _weight(self, name: str) -> torch.Tensor:
        weight = getattr(self.get_submodule(name), "weight", None)
        if weight is None:
            raise ValueError(
                f"factor '{name}' holds packed weights, so the dense matrix can't be formed. "
                "Run one forward pass of the model first: compressed-tensors unpacks it then."
            )
        return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


class CURLinear(FactoredLinear):
    """``y = C (U (R x)) + b`` with real columns ``C`` and real rows ``R`` of the dense weight.

    Children: ``cur_r`` ``(r, n)``, ``cur_u`` ``(r, r)``, ``cur_c`` ``(m, r)``, which carries the
    bias. Buffers ``rows`` and ``columns`` ``(r,)`` int32 say which rows and columns they are.
    """

    form = "cur"
    factor_names = ("cur_r", "cur_u", "cur_c")
    rows: torch.Tensor
    columns: torch.Tensor

    def make_factors(self, bias: bool, **kwargs: Any) -> None:
        n, m, r = self.in_features, self.out_features, self.rank
        self.cur_r = nn.Linear(n, r, bias=False, **kwargs)
        self.cur_u = nn.Linear(r, r, bias=False, **kwargs)
        self.cur_c = nn.Linear(r, m, bias=bias, **kwargs)
        for name in ("rows", "columns"):
            self.register_buffer(name, torch.zeros(r, dtype=torch.int32, device=kwargs["device"]))

    def load_factors(
        self, factors: CUR, bias: torch.Tensor | None = None, *, write: Write = copy_tensor
    ) -> None:
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


class InterpolativeLinear(FactoredLinear):
    """Row ID: ``z = S x``, ``y = P [z; T z] + b``.

    Children: ``id_s`` ``(r, n)`` and ``id_t`` ``(m − r, r)``. Buffer ``order`` ``(m,)`` int32:
    output ``i`` is entry ``order[i]`` of ``[z; T z]``. The bias is the container's, added after
    ordering, since ``T`` must act on ``z`` without it.
    """

    form = "id"
    factor_names = ("id_s", "id_t")
    order: torch.Tensor

    def make_factors(self, bias: bool, **kwargs: Any) -> None:
        n, m, r = self.in_features, self.out_features, self.rank
        if r == m:
            raise ValueError(
                f"rank {r} leaves no output to interpolate in a {m}x{n} layer: a row ID needs "
                "rank < out_features. Leave the layer dense instead."
            )
        self.id_s = nn.Linear(n, r, bias=False, **kwargs)
        self.id_t = nn.Linear(r, m - r, bias=False, **kwargs)
        self.bias = nn.Parameter(torch.zeros(m, **kwargs)) if bias else None
        self.register_buffer("order", torch.zeros(m, dtype=torch.int32, device=kwargs["device"]))

    def load_factors(
        self, factors: RowID, bias: torch.Tensor | None = None, *, write: Write = copy_tensor
    ) -> None:
        write(self.id_s, "weight", factors.S)
        write(self.id_t, "weight", factors.T)
        write(self, "order", factors.order)
        if bias is not None:
            write(self, "bias", bias)
        self._stand_in = []

    def product(self, x: torch.Tensor) -> torch.Tensor:
        z = self.id_s(x)
        y = torch.cat([z, self.id_t(z)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> torch.Tensor:
        S = self._weight("id_s")
        return torch.cat([S, self._weight("id_t") @ S]).index_select(0, self.order)

    def effective_bias(self) -> torch.Tensor | None:
        return self.bias


FACTORED_CLASSES: dict[str, type[CURLinear] | type[InterpolativeLinear]] = {
    "cur": CURLinear,
    "id": InterpolativeLinear,
}
