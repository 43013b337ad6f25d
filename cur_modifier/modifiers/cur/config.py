"""The typed parts of a ``CURModifier`` stage, as they stand in a recipe."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cur_modifier.forms.form import Form
from cur_modifier.forms.sizes import dense_parameters
from cur_modifier.linalg import round_rank_down, round_rank_up

__all__ = ["Fit", "LayersConfig", "RankConfig"]

DEFAULT_LAYER_COUNT = 10


class Fit(StrEnum):
    """The norm ``‖M (W − Ŵ) N‖_F`` in which the free factors are fitted.

    ``loss``: ``N = G^{1/2}`` of the inputs and ``M = H^{1/2}`` of the loss's gradients at the
    outputs, the growth of the loss itself; ``gram``: ``M = I``, the layer's mean squared output
    error; ``diag``: the diagonal of ``G`` alone; ``weight``: ``N = I``, no activations.
    """

    LOSS = "loss"
    GRAM = "gram"
    DIAG = "diag"
    WEIGHT = "weight"

    @property
    def needs_activations(self) -> bool:
        """Whether the fit looks at calibration data."""
        return self is not Fit.WEIGHT


class RankConfig(BaseModel):
    """One way to choose the ranks: exactly one of fixed, max, ratio and energy.

    Attributes:
        fixed: this rank.
        max: the largest rank that still stores less than the dense layer, at most this (CURing).
        ratio: the largest rank whose stored parameters are at most this share of the dense ones.
        energy: the smallest rank that holds this share of the squared spectrum of the weight,
            scaled by the root mean square of its inputs (unless the fit is ``weight``). A module
            whose rank would store no less than the dense layer stays dense, and the log says so.
        budget: ``uniform`` gives every module the ``ratio``; ``sensitivity`` spends the same
            parameters over all modules where the loss grows least (see ``SensitivityConfig``); a
            module may stay dense.
        least: with ``sensitivity``, the smallest ratio of a single module. The estimate is of
            second order and knows little of what happens far from the dense weight.
    """

    model_config = ConfigDict(extra="forbid")

    fixed: int | None = Field(default=None, ge=1)
    max: int | None = Field(default=None, ge=1)
    ratio: float | None = None
    energy: float | None = None
    budget: Literal["uniform", "sensitivity"] = "uniform"
    least: float = Field(default=0.3, ge=0, lt=1)

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
        ways = {"fixed", "max", "ratio", "energy"}
        given = sorted(way for way in ways if getattr(self, way) is not None)
        if len(given) != 1:
            raise ValueError(
                f"rank has {given or 'nothing'} set; give exactly one of fixed, max, ratio, "
                "energy, e.g. `rank: {ratio: 0.8}`."
            )
        if self.budget == "sensitivity":
            if self.ratio is None:
                raise ValueError(
                    f"budget 'sensitivity' spends a ratio, but {given[0]} is given. Write e.g. "
                    "`rank: {ratio: 0.8, budget: sensitivity}`."
                )
            if self.ratio <= self.least:
                raise ValueError(
                    f"ratio {self.ratio} is not above least {self.least}, which a budget by "
                    "sensitivity leaves of every module. Raise the ratio, or lower `least`."
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
            needed: the energy rank, which only the data can tell. Without it an ``energy`` wish,
                and a budget by sensitivity, answer with the smallest rank that they may choose, of
                which every other is a multiple.

        Raises:
            ValueError: no rank meets the wish; it names the wish, the bound and the remedy.
        """
        sizes = form.sizes
        if self.fixed is not None:
            return self._fixed(form, m, n, multiple_of)
        bound = sizes.break_even_rank(m, n, bias=bias)
        if self.energy is not None or self.budget == "sensitivity":
            rank = round_rank_up(needed or 1, multiple_of)
            return rank if rank <= bound else None
        if self.max is not None:
            bound, wish = min(bound, self.max), f"max {self.max} below break-even"
        else:
            assert self.ratio is not None
            bound = sizes.ratio_rank(m, n, self.ratio, bias=bias)
            wish = f"ratio {self.ratio} (parameters stored after ÷ before)"
        rank = round_rank_down(bound, multiple_of)
        if rank < 1:
            least = sizes.parameters(m, n, multiple_of, bias=bias)
            dense = dense_parameters(m, n, bias=bias)
            raise ValueError(
                f"{wish} allows rank {bound} for a {m}x{n} weight in form '{form.name}', and no "
                f"rank >= 1 that is a multiple of {multiple_of} is below it (rank {multiple_of} "
                f"stores {least} parameters, the dense weight {dense}). Raise it, lower "
                "`multiple_of`, or put the module on `ignore`."
            )
        return rank

    def _fixed(self, form: Form, m: int, n: int, multiple_of: int) -> int:
        assert self.fixed is not None
        limit = form.sizes.largest_rank(m, n)
        if self.fixed > limit:
            raise ValueError(
                f"rank {self.fixed} is above {limit} ({form.sizes.rank_limit}) for a {m}x{n} "
                f"weight in form '{form.name}'. Lower `rank.fixed`, or put the module on `ignore`."
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
            last layer excluded (CURing); ``sensitivity`` those whose factors are expected to cost
            the loss least, at their ranks and by the curvature that ``SensitivityConfig`` measures;
            ``random`` draws from all but the first and last; ``last`` takes the last ``count``;
            ``all``; or a list of indices.
        count: how many; 10 where none is given. Not for ``all`` or a list.
    """

    model_config = ConfigDict(extra="forbid")

    select: Literal["angular", "sensitivity", "all", "last", "random"] | list[int] = "angular"
    count: int | None = Field(default=None, ge=1)

    @field_validator("select", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        known = ("angular", "sensitivity", "all", "last", "random")
        if isinstance(value, str) and value not in known:
            raise ValueError(
                f"unknown layer selection {value!r}; choose {', '.join(known)}, or give a list of "
                "layer indices."
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
        return self.select in ("angular", "sensitivity", "last", "random")

    @property
    def resolved_count(self) -> int:
        """``count`` with its default."""
        return self.count if self.count is not None else DEFAULT_LAYER_COUNT

    def pool(self, total: int) -> list[int]:
        """Indices of the layers that may be chosen of ``total``, before any data is seen.

        Raises:
            ValueError: an index outside the model, or fewer layers than ``count``.
        """
        if isinstance(self.select, list):
            bad = [index for index in self.select if not 0 <= index < total]
            if bad or not self.select:
                raise ValueError(
                    f"layers.select holds {bad or 'nothing'}; the model has layers 0 to "
                    f"{total - 1}."
                )
            return sorted(set(self.select))
        if self.select == "all":
            return list(range(total))
        count = self.resolved_count
        anywhere = self.select in ("last", "sensitivity")
        pool = list(range(total)) if anywhere else list(range(1, total - 1))
        if count > len(pool):
            excluded = "" if anywhere else ", first and last excluded"
            raise ValueError(
                f"layers.count is {count}, but the model has {len(pool)} layers to choose from "
                f"({total} in all{excluded}). Lower `layers.count`, or use "
                "`layers: {select: all}`."
            )
        return pool[-count:] if self.select == "last" else pool

    def check_count(self, pool: Collection[int]) -> None:
        """Raises:
        ValueError: fewer layers of the pool have targets, those in ``pool``, than are to be chosen.
        """
        chooses = self.select in ("angular", "random", "sensitivity")
        if chooses and self.resolved_count > len(pool):
            raise ValueError(
                f"layers.count is {self.resolved_count}, but the targets match modules in "
                f"{len(pool)} of the layers to choose from. Lower `layers.count`."
            )

    def choose(self, pool: Collection[int], seed: int, costs: Sequence[float] | None) -> list[int]:
        """The chosen layer indices, ascending.

        Args:
            pool: candidate layers that have targets; at least as many as are to be chosen.
            costs: by layer, of which the least are taken: angular distances for ``angular``,
                expected growth of the loss for ``sensitivity``. Ties go to the deeper layer.
        """
        chosen = sorted(pool)
        if self.select == "random":
            chosen = random.Random(seed).sample(chosen, self.resolved_count)
        elif self.select in ("angular", "sensitivity"):
            assert costs is not None
            chosen.sort(key=lambda index: (costs[index], -index))
            chosen = chosen[: self.resolved_count]
        return sorted(chosen)
