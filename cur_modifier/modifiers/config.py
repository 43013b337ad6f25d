"""The typed parts of a ``CURModifier`` stage, as they stand in a recipe."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cur_modifier.linalg import (
    Form,
    break_even_rank,
    ratio_rank,
    round_rank_down,
    round_rank_up,
    stored_parameters,
)

__all__ = ["Fit", "LayersConfig", "RankConfig"]

DEFAULT_LAYER_COUNT = 10


class Fit(StrEnum):
    """The norm ``‖(W − Ŵ) N‖_F`` in which the free factors are fitted.

    ``gram``: ``N = G^{1/2}``, the layer's mean squared output error; ``diag``: its diagonal alone;
    ``weight``: ``N = I``, no activations.
    """

    GRAM = "gram"
    DIAG = "diag"
    WEIGHT = "weight"

    @property
    def needs_activations(self) -> bool:
        """Whether the fit looks at calibration data."""
        return self is not Fit.WEIGHT


class RankConfig(BaseModel):
    """One way to choose the rank of a module. Exactly one field is given.

    Attributes:
        fixed: this rank.
        max: the largest rank that still stores less than the dense layer, at most this (CURing).
        ratio: the largest rank whose stored parameters are at most this share of the dense ones.
        energy: the smallest rank that holds this share of the squared spectrum of the weight,
            scaled by the root mean square of its inputs (unless the fit is ``weight``). A module
            whose rank would store no less than the dense layer stays dense, and the log says so.
    """

    model_config = ConfigDict(extra="forbid")

    fixed: int | None = Field(default=None, ge=1)
    max: int | None = Field(default=None, ge=1)
    ratio: float | None = None
    energy: float | None = None

    @field_validator("ratio", "energy")
    @classmethod
    def _share(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise ValueError(
                f"{value} is outside (0, 1]. A ratio is parameters stored after ÷ before, an "
                "energy a share of the squared spectrum: 0.8 keeps 80 % of them."
            )
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = sorted(self.model_fields_set - {k for k, v in self if v is None})
        if len(given) != 1:
            raise ValueError(
                f"rank has {given or 'nothing'} set; give exactly one of fixed, max, ratio, "
                "energy, e.g. `rank: {ratio: 0.8}`."
            )
        return self

    def choose(
        self,
        form: Form,
        m: int,
        n: int,
        *,
        bias: bool = False,
        multiple_of: int = 1,
        needed: int | None = None,
    ) -> int | None:
        """The rank for a ``(m, n)`` weight, or None where the module should stay dense.

        Args:
            needed: the energy rank, which only the data can tell. Without it an ``energy`` wish
                answers with the smallest rank it may take, of which every other is a multiple.

        Raises:
            ValueError: no rank meets the wish; it names the wish, the bound and the remedy.
        """
        limit = min(m, n) if form is Form.CUR else min(m - 1, n)
        if self.fixed is not None:
            return self._fixed(form, m, n, limit, multiple_of)
        bound = min(break_even_rank(form, m, n, bias=bias), limit)
        if self.energy is not None:
            rank = round_rank_up(needed or 1, multiple_of)
            return rank if rank <= bound else None
        if self.max is not None:
            bound, wish = min(bound, self.max), f"max {self.max} below break-even"
        else:
            assert self.ratio is not None
            bound = min(ratio_rank(form, m, n, self.ratio, bias=bias), limit)
            wish = f"ratio {self.ratio} (parameters stored after ÷ before)"
        rank = round_rank_down(bound, multiple_of)
        if rank < 1:
            least = stored_parameters(form, m, n, multiple_of, bias=bias)
            raise ValueError(
                f"{wish} allows rank {bound} for a {m}x{n} weight in form '{form}', and no rank >= "
                f"1 that is a multiple of {multiple_of} is below it (rank {multiple_of} stores "
                f"{least} parameters, the dense weight {m * n + m * bias}). Raise it, lower "
                "`multiple_of`, or put the module on `ignore`."
            )
        return rank

    def _fixed(self, form: Form, m: int, n: int, limit: int, multiple_of: int) -> int:
        assert self.fixed is not None
        if self.fixed > limit:
            reason = (
                "min(out, in)" if limit == min(m, n) else "out − 1, since a row ID interpolates"
            )
            raise ValueError(
                f"rank {self.fixed} is above {limit} ({reason}) for a {m}x{n} weight in form "
                f"'{form}'. Lower `rank.fixed`, or put the module on `ignore`."
            )
        if self.fixed % multiple_of:
            raise ValueError(
                f"rank {self.fixed} is not a multiple of multiple_of = {multiple_of}. "
                f"Use {round_rank_down(self.fixed, multiple_of) or multiple_of}."
            )
        return self.fixed


class LayersConfig(BaseModel):
    """Which decoder layers are factored.

    Attributes:
        select: ``angular`` takes the ``count`` layers that turn the hidden state least, first and
            last layer excluded (CURing); ``random`` draws them from the same layers; ``last`` takes
            the last ``count``; ``all``; or a list of indices.
        count: how many; 10 where none is given. Not for ``all`` or a list.
    """

    model_config = ConfigDict(extra="forbid")

    select: Literal["angular", "all", "last", "random"] | list[int] = "angular"
    count: int | None = Field(default=None, ge=1)

    @field_validator("select", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        if isinstance(value, str) and value not in ("angular", "all", "last", "random"):
            raise ValueError(
                f"unknown layer selection {value!r}; choose angular, all, last, random, or give a "
                "list of layer indices."
            )
        return value

    @model_validator(mode="after")
    def _count_applies(self) -> Self:
        if self.count is not None and not self.counted:
            raise ValueError(
                f"count {self.count} has no meaning with select {self.select!r}; leave it out."
            )
        return self

    @property
    def counted(self) -> bool:
        """Whether ``count`` decides how many layers are taken."""
        return self.select in ("angular", "last", "random")

    @property
    def resolved_count(self) -> int:
        """``count`` with its default."""
        return self.count if self.count is not None else DEFAULT_LAYER_COUNT
