"""The typed parts of an ``IDPruningModifier`` stage, as they stand in a recipe."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["BudgetConfig", "Measure"]

Measure = Literal["ratio", "parameters", "macs"]
_MEASURES: tuple[Measure, ...] = ("ratio", "parameters", "macs")
_TOKENS = 128
_LEAST = 0.3


class BudgetConfig(BaseModel):
    """What may be left: exactly one of ratio, parameters and macs, each a share in (0, 1).

    Attributes:
        ratio: parameters after ÷ before, of the layers that hold matched units, all of their
            parameters counted.
        parameters: the same of the whole model.
        macs: multiply-accumulates after ÷ before of those layers, for one sequence; the products of
            attention are counted, as STAT and Kwon et al. do. Of convolutions, for one image of the
            calibration data's size.
        sequence_length: tokens of that sequence.
        by: ``sensitivity`` spends the budget over kinds of units, and with ``shapes: free`` over
            layers, where the loss grows least (see ``SensitivityConfig``); ``uniform`` keeps the
            same share of every kind in every layer.
        least: with ``sensitivity``, the smallest share of its units that a layer keeps. The
            estimate is of second order and knows little of what happens far from the dense layer.
            By default 0.3, or the square of the budget where that is less: a small budget cannot
            afford what some layers have no use for.
    """

    model_config = ConfigDict(extra="forbid")

    ratio: float | None = None
    parameters: float | None = None
    macs: float | None = None
    sequence_length: int = Field(default=_TOKENS, ge=1)
    by: Literal["sensitivity", "uniform"] = "sensitivity"
    least: float | None = Field(default=None, ge=0, lt=1)

    @field_validator(*_MEASURES)
    @classmethod
    def _share(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(
                f"{value} is outside (0, 1): a budget is what is left ÷ what was. 0.8 keeps 80 %."
            )
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [measure for measure in _MEASURES if getattr(self, measure) is not None]
        if len(given) != 1:
            raise ValueError(
                f"budget has {given or 'nothing'} set; give exactly one of "
                f"{', '.join(_MEASURES)}, e.g. `budget: {{ratio: 0.8}}`."
            )
        if self.sequence_length != _TOKENS and self.macs is None:  # a dump gives the default
            raise ValueError(
                f"sequence_length {self.sequence_length} has no meaning with {given[0]}: only "
                "multiply-accumulates depend on it. Leave it out, or give `macs`."
            )
        return self

    @property
    def measure(self) -> Measure:
        """What is counted."""
        return next(measure for measure in _MEASURES if getattr(self, measure) is not None)

    @property
    def floor(self) -> float:
        """``least``, or what it is by default."""
        return min(_LEAST, self.share**2) if self.least is None else self.least

    @property
    def share(self) -> float:
        """What may be left of it."""
        value: float = getattr(self, self.measure)
        return value
