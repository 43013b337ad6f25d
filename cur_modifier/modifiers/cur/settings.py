"""The fields of a ``CURModifier`` stage, and what follows from them alone."""

from __future__ import annotations

from typing import Self

from llmcompressor.modifiers import Modifier
from pydantic import Field, field_serializer, field_validator, model_validator

from cur_modifier.forms.form import Form
from cur_modifier.forms.registry import find_form
from cur_modifier.linalg import Score, Selection
from cur_modifier.modifiers.config import RefineConfig, SensitivityConfig
from cur_modifier.modifiers.cur.config import Fit, LayersConfig, RankConfig

__all__ = ["CURSettings"]


# Selections that weigh rows and columns in the norm of the fit, and look at no scores.
_BY_ERROR = (Selection.GREEDY, Selection.ELIMINATION)


class CURSettings(Modifier):
    """What a recipe says of the stage. ``CURModifier`` documents every field."""

    targets: list[str] = Field(
        default_factory=lambda: ["re:.*q_proj$", "re:.*k_proj$", "re:.*gate_proj$"], min_length=1
    )
    ignore: list[str] = Field(default_factory=list)
    form: str = "cur"
    scores: Score | None = None
    selection: Selection | None = None
    share_skeleton: bool = False
    fit: Fit = Fit.GRAM
    anchor: float | None = Field(default=None, ge=0, le=1)
    refine: RefineConfig | None = None
    sensitivity: SensitivityConfig = Field(default_factory=SensitivityConfig)
    rank: RankConfig = Field(default_factory=lambda: RankConfig(max=256))
    layers: LayersConfig = Field(default_factory=LayersConfig)
    multiple_of: int | None = Field(default=None, ge=1)
    seed: int = 0
    mlflow: bool = True

    @field_validator("form")
    @classmethod
    def _known(cls, value: str) -> str:
        return find_form(value).name

    @field_serializer("scores", "selection", "fit")
    def _plain(self, value: str | None) -> str | None:
        # llm-compressor dumps recipes with python tags for enums, which then do not load.
        return None if value is None else str(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        form = self.storage
        if self.selection is not None and not form.selects:
            raise ValueError(
                f"selection '{self.selection}' chooses real rows or columns, and form "
                f"'{self.form}' is made of none. Drop `selection` and `scores`, or choose another "
                "form."
            )
        optimal = self.resolved_selection is None
        if optimal and self.scores is not None:
            remedy = "Give `selection` as well (e.g. qdeim), or drop" if form.selects else "Drop"
            raise ValueError(
                f"scores '{self.scores}' guide a selection, and form '{self.form}' without one "
                f"takes the optimal approximation. {remedy} `scores`."
            )
        if self.selection in _BY_ERROR and self.scores is not None:
            raise ValueError(
                f"scores '{self.scores}' mean nothing to selection '{self.selection}', which "
                "weighs rows and columns in the norm of the fit. Drop `scores`, or choose another "
                "selection."
            )
        if self.layers.select == "sensitivity" and self.rank.energy is not None:
            raise ValueError(
                f"layers are selected by sensitivity at their ranks, but energy {self.rank.energy} "
                "gives ranks after the layers are known. Give fixed, max or ratio, or select "
                "layers otherwise."
            )
        if self.share_skeleton and not (form.sizes.shares_skeletons and optimal):
            given = f"form '{self.form}'"
            if form.sizes.shares_skeletons:
                given = f"selection '{self.selection}'"
            raise ValueError(
                f"share_skeleton is set with {given}; only a row ID of the optimal approximation "
                "can share its skeleton. Write `form: id` without `selection` and `scores`, or "
                "drop `share_skeleton`."
            )
        return self

    @property
    def storage(self) -> Form:
        """The form, which answers for itself."""
        return find_form(self.form)

    @property
    def resolved_selection(self) -> Selection | None:
        """How rows and columns are chosen; None for the optimal approximation."""
        default = self.storage.default_selection
        return self.selection or (None if default is None else Selection(default))

    @property
    def resolved_scores(self) -> Score | None:
        """What the selection looks at; None for the weight itself."""
        if self.resolved_selection in (None, *_BY_ERROR):
            return self.scores
        return self.scores or Score.WANDA

    @property
    def rank_unit(self) -> int:
        """What every rank is a multiple of."""
        if self.multiple_of is not None:
            return self.multiple_of
        return 1 if self.rank.fixed is not None else 8

    @property
    def layerwise(self) -> bool:
        """Whether the stage runs the layers itself, dense beside compressed."""
        return self.anchor is not None or self.refine is not None

    @property
    def needs_activations(self) -> bool:
        """Whether the fit of a module looks at calibration data."""
        scores = self.resolved_scores
        return self.fit.needs_activations or (scores is not None and scores.needs_activations)

    @property
    def needs_gradients(self) -> bool:
        """Whether the loss's curvature is measured."""
        by_curvature = "sensitivity" in (self.rank.budget, self.layers.select)
        return self.fit is Fit.LOSS or by_curvature or self.refine is not None

    @property
    def needs_survey(self) -> bool:
        """Whether the dense model is surveyed before anything is changed."""
        by_energy = self.rank.energy is not None and self.fit.needs_activations
        return self.layers.select == "angular" or by_energy

    @property
    def data_reasons(self) -> list[str]:
        """What in the recipe asks for calibration data."""
        scores = self.resolved_scores
        reasons = {
            f"scores '{scores}'": scores is not None and scores.needs_activations,
            f"fit '{self.fit}'": self.fit.needs_activations,
            "layers selected by angular distance": self.layers.select == "angular",
            "layers selected by sensitivity": self.layers.select == "sensitivity",
            "a rank by energy": self.rank.energy is not None and self.fit.needs_activations,
            "anchor and refine": self.layerwise,
            "a budget by sensitivity": self.rank.budget == "sensitivity",
        }
        return [reason for reason, holds in reasons.items() if holds]
