"""What a factored checkpoint says of itself: the one schema that all readers share.

It is the ``quantization_config`` of ``config.json``::

    {"quant_method": "cur", "version": 1, "producer": "cur_modifier 0.1.0",
     "modules": {"model.layers.3.self_attn.q_proj":
         {"form": "cur", "rank": 192, "in_features": 576, "out_features": 576, "bias": false}},
     "compressed_tensors": {...}}        # as compressed-tensors wrote it, or null

Imports pydantic only, so that any reader can use it: the transformers quantizer, the vLLM plugin,
a script on a laptop.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "QUANT_METHOD",
    "SCHEMA_VERSION",
    "Layout",
    "LayoutError",
    "ModuleLayout",
]

QUANT_METHOD = "cur"
SCHEMA_VERSION = 1


class LayoutError(ValueError):
    """A ``quantization_config`` that this version cannot read."""


class ModuleLayout(BaseModel):
    """One factored Linear: ``out_features × in_features`` at ``rank``.

    Attributes:
        form: ``cur`` (``C U R``) or ``id`` (interpolative).
        axis: whether an interpolative decomposition keeps rows (outputs) or columns (inputs).
        order: ``stored`` where an ``order`` tensor stands beside the factors; ``absorbed`` where a
            neighbouring layer's weights were permuted instead.
        shared_skeleton: the group whose modules read one skeleton, e.g. q/k/v of a layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Literal["cur", "id"]
    rank: int = Field(ge=1)
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    bias: bool = False
    axis: Literal["row", "column"] = "row"
    order: Literal["stored", "absorbed"] = "stored"
    shared_skeleton: str | None = None

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        limit = min(self.in_features, self.out_features)
        if self.rank > limit:
            raise ValueError(f"rank {self.rank} is above min(out_features, in_features) = {limit}")
        return self

    @property
    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """Weight shape ``(out, in)`` of every factor, by the child's name.

        A factor's tensors may be stored packed by compressed-tensors, under its names
        (``cur_c.weight_packed``, …).

        Raises:
            LayoutError: a variant that the schema knows and this version does not build.
        """
        if (self.axis, self.order, self.shared_skeleton) != ("row", "stored", None):
            raise LayoutError(
                f"{self.form} with axis '{self.axis}', order '{self.order}' and shared skeleton "
                f"{self.shared_skeleton!r} needs a newer cur-modifier. "
                "Upgrade it: pip install -U cur-modifier"
            )
        m, n, r = self.out_features, self.in_features, self.rank
        if self.form == "cur":
            return {"cur_r": (r, n), "cur_u": (r, r), "cur_c": (m, r)}
        return {"id_s": (r, n), "id_t": (m - r, r)}


class Layout(BaseModel):
    """The whole ``quantization_config`` of a factored checkpoint."""

    model_config = ConfigDict(extra="forbid")

    quant_method: Literal["cur"] = "cur"
    version: int = SCHEMA_VERSION
    producer: str = ""
    modules: dict[str, ModuleLayout]
    compressed_tensors: dict[str, Any] | None = None

    @classmethod
    def read(cls, section: dict[str, Any]) -> Self:
        """Parse a ``quantization_config``.

        Raises:
            LayoutError: an unknown schema version, or a section that does not fit the schema; it
                names the entry.
        """
        version = section.get("version")
        if version != SCHEMA_VERSION:
            raise LayoutError(
                f"quantization_config has schema version {version!r}; this cur-modifier reads "
                f"version {SCHEMA_VERSION}. Upgrade it (pip install -U cur-modifier), or compress "
                f"the model again. The checkpoint was written by {section.get('producer')!r}."
            )
        try:
            return cls.model_validate(section)
        except ValidationError as error:
            raise LayoutError(f"quantization_config is not a valid CUR layout: {error}") from error

    def write(self) -> dict[str, Any]:
        """The JSON form, with defaults left out of the modules' entries."""
        section = self.model_dump(mode="json", exclude={"modules"})
        section["modules"] = {
            name: {
                **module.model_dump(mode="json", exclude_defaults=True),
                "bias": module.bias,
            }
            for name, module in self.modules.items()
        }
        return section
