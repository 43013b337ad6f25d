"""What a factored checkpoint says of itself: the one schema that all readers share.

It is the ``quantization_config`` of ``config.json``::

    {"quant_method": "cur", "version": 1,
     "producer": {"name": "cur_modifier", "version": "0.1.0"},
     "modules": {"model.layers.3.self_attn.q_proj":
         {"form": "cur", "rank": 192, "in_features": 576, "out_features": 576, "bias": false}},
     "files": {"model.safetensors": "<SHA-256>"},
     "compressed_tensors": {...}}        # as compressed-tensors wrote it, or null

Imports pydantic only, so that any reader can use it: the transformers quantizer, the vLLM plugin,
a script on a laptop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "QUANT_METHOD",
    "SCHEMA_VERSION",
    "Layout",
    "LayoutError",
    "ModuleLayout",
    "Producer",
    "checksum",
    "stored_shapes",
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

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor below the module's name, as if none were quantized.

        Raises:
            LayoutError: as :attr:`factor_shapes`.
        """
        shapes: dict[str, tuple[int, ...]] = {
            f"{factor}.weight": shape for factor, shape in self.factor_shapes.items()
        }
        if self.form == "cur":
            shapes |= {"rows": (self.rank,), "columns": (self.rank,)}
        else:
            shapes["order"] = (self.out_features,)
        if self.bias:
            shapes["cur_c.bias" if self.form == "cur" else "bias"] = (self.out_features,)
        return shapes


class Producer(BaseModel):
    """Who wrote a checkpoint: an object with a name, as ModelOpt has it and vLLM expects it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = ""
    version: str = ""


class Layout(BaseModel):
    """The whole ``quantization_config`` of a factored checkpoint.

    Attributes:
        modules: the factored Linears by name.
        files: SHA-256 of every weights file by name. Where it is empty, nothing is compared.
        compressed_tensors: how factors and other layers are quantized, as compressed-tensors
            wrote it.
    """

    model_config = ConfigDict(extra="forbid")

    quant_method: Literal["cur"] = "cur"
    version: int = SCHEMA_VERSION
    producer: Producer = Field(default_factory=Producer)
    modules: dict[str, ModuleLayout]
    files: dict[str, str] = Field(default_factory=dict)
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

    def check_supported(self) -> None:
        """Refuse what the schema knows and this version does not build.

        Raises:
            LayoutError: it names the module and the variant.
        """
        for name, module in self.modules.items():
            try:
                _ = module.factor_shapes
            except LayoutError as error:
                raise LayoutError(f"{name}: {error}") from error

    def check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the tensors of a checkpoint, by name and shape, with what this layout asks for.

        Raises:
            LayoutError: a missing tensor, or one whose shape disagrees.
        """
        self.check_supported()
        for name, module in self.modules.items():
            for key, shape in module.tensor_shapes.items():
                full = f"{name}.{key}"
                # compressed-tensors packs the inputs of a weight; its rows stay rows.
                packed = shapes.get(f"{full}_packed")
                found = shapes.get(full, packed and (packed[0], *shape[1:]))
                if found is None:
                    raise LayoutError(
                        f"{full} is missing from the checkpoint. Download or save it again."
                    )
                if tuple(found) != shape:
                    raise LayoutError(
                        f"{full} has shape {tuple(found)}; config.json gives rank {module.rank}, "
                        f"so {shape}. config.json was edited, or belongs to another checkpoint."
                    )

    def check_files(self, directory: Path) -> None:
        """Compare the weights files in ``directory`` with their checksums; reads all of them.

        Raises:
            LayoutError: a file that is missing or was changed.
        """
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                raise LayoutError(f"{path} is missing. Download or save the checkpoint again.")
            if checksum(path) != expected:
                raise LayoutError(
                    f"{path} is not the file that was saved: its checksum differs from "
                    "config.json's 'files'. Download or save it again, or remove that entry if the "
                    "change is meant."
                )


def stored_shapes(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in safetensors ``files`` by name, from their headers alone.

    Raises:
        LayoutError: a file that is truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open  # a reader of config.json alone goes without

    shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    shapes[key] = tuple(tensors.get_slice(key).get_shape())
        except SafetensorError as error:
            raise LayoutError(
                f"{file} is truncated or corrupt ({error}). Download or save it again."
            ) from error
    return shapes


def checksum(path: Path) -> str:
    """SHA-256 of a file; computed once a process while the file does not change."""
    state = path.stat()
    return _checksum(path, state.st_size, state.st_mtime_ns)


@cache
def _checksum(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
