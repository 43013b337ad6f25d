"""The forms by name: what each stores of an ``(m, n)`` weight at rank ``r``, in shapes alone.

Imports nothing, so that whatever reads a checkpoint's ``config.json`` can use it. :data:`FORMS` is
the one registry. The ``module`` of an entry is the name of the form's module in three folders:
``linalg`` solves for its factors, ``forms`` computes with them, ``vllm/forms`` serves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["FORMS", "Shape", "Sized", "Sizes", "dense_parameters"]


class Sized(Protocol):
    """A factored module as far as its sizes go. A checkpoint's ``ModuleSpec`` is one."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def direct_outputs(self) -> int | None:
        """Where a row ID's skeleton is shared, how many of its rows are this module's outputs."""

    @property
    def shared_skeleton(self) -> str | None:
        """The module whose skeleton this one uses; None where it has its own."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a module by itself."""

    out_features: int
    in_features: int
    rank: int
    direct_outputs: int | None = None
    shared_skeleton: str | None = None


class Sizes:
    """The shapes of one form.

    Attributes:
        module: name of the form's module in ``linalg``, ``forms`` and ``vllm/forms``.
        bias: name of the tensor that holds a module's bias.
        rank_limit: what :meth:`largest_rank` is, in words.
        shares_skeletons: whether modules may share their first factor.
    """

    module: str
    bias: str
    rank_limit = "min(out, in)"
    shares_skeletons = False

    def largest_rank(self, m: int, n: int) -> int:
        """The largest rank that the form has for an ``(m, n)`` weight."""
        return min(m, n)

    def factors(self, spec: Sized) -> dict[str, tuple[int, int]]:
        """Weight shape ``(out, in)`` of every factor by its child's name, in the order in which
        they are applied."""
        raise NotImplementedError

    def indices(self, spec: Sized) -> dict[str, tuple[int, ...]]:
        """Shape of every index tensor by its name."""
        return {}

    def tensors(self, spec: Sized, *, bias: bool) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor below the module's name, as if none were quantized."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}.weight": shape for name, shape in self.factors(spec).items()
        }
        shapes |= self.indices(spec)
        return shapes | ({self.bias: (spec.out_features,)} if bias else {})

    def stored(self, spec: Sized, *, bias: bool = False) -> int:
        """Parameters that the module stores. Indices are none: they count in bytes."""
        factors = sum(rows * columns for rows, columns in self.factors(spec).values())
        return factors + spec.out_features * bias

    def parameters(self, m: int, n: int, rank: int, *, bias: bool = False) -> int:
        """Parameters of a factored ``(m, n)`` weight."""
        return self.stored(Shape(m, n, rank), bias=bias)

    def ratio_rank(self, m: int, n: int, ratio: float, *, bias: bool = False) -> int:
        """The largest rank whose stored parameters are at most ``ratio`` times the dense ones, or
        0.

        *Ratio* always means parameters stored after ÷ before, everything counted: all factors, and
        the bias on both sides.

        Raises:
            ValueError: the ratio is outside (0, 1].
        """
        if not 0 < ratio <= 1:
            raise ValueError(
                f"ratio {ratio} is outside (0, 1]: it is parameters stored after ÷ before. "
                "0.8 keeps 80 % of them."
            )
        return self._rank_within(m, n, ratio * dense_parameters(m, n, bias=bias), bias)

    def break_even_rank(self, m: int, n: int, *, bias: bool = False) -> int:
        """The largest rank that stores strictly fewer parameters than the dense layer, or 0.

        For CUR this is ``⌈(√(m² + 6mn + n²) − (m + n)) / 2⌉ − 1``, CURing's bound.
        """
        return self._rank_within(m, n, dense_parameters(m, n, bias=bias) - 1, bias)

    def _rank_within(self, m: int, n: int, budget: float, bias: bool) -> int:
        # Stored parameters grow with the rank in every form, so bisection is exact where the
        # quadratic formula would need care with rounding.
        low, high = 0, self.largest_rank(m, n)
        while low < high:
            middle = (low + high + 1) // 2
            if self.parameters(m, n, middle, bias=bias) <= budget:
                low = middle
            else:
                high = middle - 1
        return low


class CURSizes(Sizes):
    """``C (m, r)``, ``U (r, r)``, ``R (r, n)``: ``r (m + n + r)`` parameters."""

    module = "cur"
    bias = "cur_c.bias"

    def factors(self, spec: Sized) -> dict[str, tuple[int, int]]:
        m, n, r = spec.out_features, spec.in_features, spec.rank
        return {"cur_r": (r, n), "cur_u": (r, r), "cur_c": (m, r)}

    def indices(self, spec: Sized) -> dict[str, tuple[int, ...]]:
        return {"rows": (spec.rank,), "columns": (spec.rank,)}


class RowIDSizes(Sizes):
    """``S (r, n)`` and ``T (m − c, r)`` with ``c`` direct outputs: ``r (m + n − r)`` parameters.

    A module that uses another's skeleton has no ``id_s``, and one whose outputs are all in a shared
    skeleton no ``id_t``.
    """

    module = "row_id"
    bias = "bias"
    rank_limit = "min(out − 1, in), since a row ID interpolates"
    shares_skeletons = True

    def largest_rank(self, m: int, n: int) -> int:
        """An output at least must be left to interpolate."""
        return min(m - 1, n)

    def factors(self, spec: Sized) -> dict[str, tuple[int, int]]:
        rest = spec.out_features - self.direct(spec)
        skeleton = {"id_s": (spec.rank, spec.in_features)} if spec.shared_skeleton is None else {}
        return skeleton | ({"id_t": (rest, spec.rank)} if rest else {})

    def indices(self, spec: Sized) -> dict[str, tuple[int, ...]]:
        return {"order": (spec.out_features,)}

    def stored(self, spec: Sized, *, bias: bool = False) -> int:
        """As the base class; of a shared skeleton each module counts its own outputs' rows."""
        m, n, c = spec.out_features, spec.in_features, self.direct(spec)
        return c * n + (m - c) * spec.rank + m * bias

    @staticmethod
    def direct(spec: Sized) -> int:
        """Outputs that the skeleton gives directly, ``c``: all of its rows unless it is shared."""
        return spec.rank if spec.direct_outputs is None else spec.direct_outputs


class LowRankSizes(Sizes):
    """``A (m, r)``, ``B (r, n)``: ``r (m + n)`` parameters."""

    module = "low_rank"
    bias = "lr_a.bias"

    def factors(self, spec: Sized) -> dict[str, tuple[int, int]]:
        m, n, r = spec.out_features, spec.in_features, spec.rank
        return {"lr_b": (r, n), "lr_a": (m, r)}


FORMS: dict[str, Sizes] = {"cur": CURSizes(), "id": RowIDSizes(), "low_rank": LowRankSizes()}
"""Every form by its name in a recipe and in a checkpoint."""


def dense_parameters(m: int, n: int, *, bias: bool = False) -> int:
    """Parameters of a dense ``(m, n)`` layer."""
    return m * n + m * bias
