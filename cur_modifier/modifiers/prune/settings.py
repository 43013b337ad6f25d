"""The fields of an ``IDPruningModifier`` stage, and what follows from them alone."""

from __future__ import annotations

from typing import Literal, Self

from llmcompressor.modifiers import Modifier
from pydantic import Field, field_serializer, model_validator

from cur_modifier.linalg import OF_BLOCKS, Selection
from cur_modifier.modifiers.config import RefineConfig, SensitivityConfig
from cur_modifier.modifiers.prune.config import BudgetConfig
from cur_modifier.structure.removal import Kind

__all__ = ["PruneSettings"]

_ANCHOR = 0.25
# Selections that need no more of a unit than the norm of its weights.
OF_WEIGHTS = (Selection.NORM, Selection.RANDOM)


class PruneSettings(Modifier):
    """What a recipe says of the stage. ``IDPruningModifier`` documents every field."""

    units: list[Kind] = Field(default=["neurons"], min_length=1)
    targets: list[str] = Field(default_factory=lambda: ["re:.*"], min_length=1)
    ignore: list[str] = Field(default_factory=list)
    budget: BudgetConfig = Field(default_factory=lambda: BudgetConfig(ratio=0.8))
    shapes: Literal["uniform", "free"] = "uniform"
    selection: Selection = Selection.ELIMINATION
    correct: Literal["layers", "consumers", "none"] = "layers"
    max_entry: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    fit: Literal["loss", "gram", "weight"] = "loss"
    anchor: float | None = Field(default=_ANCHOR, ge=0, le=1)
    refine: RefineConfig | None = None
    sensitivity: SensitivityConfig = Field(default_factory=SensitivityConfig)
    multiple_of: int = Field(default=64, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)
    served: bool = True
    seed: int = 0
    mlflow: bool = True

    @field_serializer("selection")
    def _plain(self, value: str) -> str:
        # llm-compressor dumps recipes with python tags for enums, which then do not load.
        return str(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.units)) < len(self.units):
            raise ValueError(f"units {self.units} names a kind twice; name each once.")
        several = {"heads": "a head", "channels": "a channel"}
        for what in (several[kind] for kind in self.units if kind in several):
            if self.selection not in OF_BLOCKS:
                raise ValueError(
                    f"selection '{self.selection}' chooses single features, and {what} has "
                    f"several. Choose {', '.join(OF_BLOCKS)}, or `units: [neurons]`."
                )
            if self.max_entry is not None:
                raise ValueError(
                    f"max_entry {self.max_entry} bounds the interpolation of single features by "
                    f"exchange, and {what} has several. Leave it out, or `units: [neurons]`."
                )
        if self.fit == "weight" and (asked := self._asked_of_data()):
            raise ValueError(
                f"fit 'weight' chooses by the norms of weights and looks at no data, which {asked} "
                "need. Write `selection: norm` (or random), `correct: none` and a budget with `by: "
                "uniform`, without refine; or another fit."
            )
        if self.correct == "none" and self.anchor not in (None, _ANCHOR):  # a dump has the default
            raise ValueError(
                f"anchor {self.anchor} is the dense model's share in what modules are fitted to, "
                "and `correct: none` fits none. Leave one of them out."
            )
        return self

    @model_validator(mode="after")
    def _channels(self) -> Self:
        if "channels" not in self.units:
            return self
        if "heads" in self.units:
            raise ValueError(
                f"units {self.units}: heads are looked for in decoder layers, channels in blocks "
                "of convolutions. Write a stage for each."
            )
        if self.shapes == "uniform":
            raise ValueError(
                "shapes 'uniform' with channels: convolutions of one model have different numbers "
                "of channels, and config.json has no field for those that can be removed. Write "
                "`shapes: free`."
            )
        if self.refine is not None:
            raise ValueError(
                "refine with channels: it trains Linears and norms, not convolutions. Leave one of "
                "them out; `correct: layers` fits convolutions in closed form."
            )
        if self.budget.sequence_length != BudgetConfig.model_fields["sequence_length"].default:
            raise ValueError(
                f"sequence_length {self.budget.sequence_length} with channels: convolutions are "
                "counted at the size of the calibration's images. Leave it out."
            )
        return self

    def _asked_of_data(self) -> str:
        """What of the settings no weight alone can answer."""
        asked = {
            f"selection '{self.selection}'": self.selection not in OF_WEIGHTS,
            f"correct '{self.correct}'": self.correct != "none",
            f"a budget by {self.budget.by}": self.budget.by != "uniform",
            "refine": self.refine is not None,
        }
        return ", ".join(what for what, holds in asked.items() if holds)

    @property
    def needs_data(self) -> bool:
        """Whether anything depends on calibration data."""
        return self.fit != "weight"

    @property
    def needs_gradients(self) -> bool:
        """Whether the loss's curvature is measured."""
        return self.fit == "loss" or self.budget.by == "sensitivity" or self.refine is not None
