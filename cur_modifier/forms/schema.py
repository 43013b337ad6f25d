"""What a factored checkpoint says of itself: the one schema that all readers share.

It is the ``quantization_config`` of ``config.json``::

    {"quant_method": "cur", "version": 1,
     "producer": {"name": "cur_modifier", "version": "0.1.0"},
     "modules": {
         "model.layers.3.self_attn.q_proj":
             {"form": "cur", "rank": 192, "in_features": 576, "out_features": 576, "bias": false},
         "model.layers.3.mlp.gate_proj":
             {"form": "id", "rank": 448, "in_features": 576, "out_features": 1536, "bias": false,
              "direct_outputs": 160},
         "model.layers.3.mlp.up_proj":
             {"form": "id", "rank": 448, "in_features": 576, "out_features": 1536, "bias": false,
              "direct_outputs": 288, "shared_skeleton": "model.layers.3.mlp.gate_proj"}},
     "files": {"model.safetensors": "<SHA-256>"},
     "compressed_tensors": {...}}        # as compressed-tensors wrote it, or null

Where neurons or heads were removed, and in each layer another number of them, ``config.json``'s own
fields can't express the sizes that are left. Such a section has version 2 and two more entries::

    "resized": {"model.layers.3.mlp.down_proj": {"out_features": 576, "in_features": 1120}},
    "attributes": {"model.layers.3.self_attn": {"num_heads": 7}}

Of a convolution the features are channels, and its kernel is given. Batch norms have an entry of
their own::

    "resized": {"features.3": {"out_features": 24, "in_features": 20, "kernel_size": [3, 3]}},
    "norms": {"features.1": 20}

Imports pydantic only, so that any reader can use it: the transformers quantizer, the vLLM plugin,
a script on a laptop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from .sizes import FORMS, Sizes

__all__ = [
    "QUANT_METHOD",
    "SCHEMA_VERSION",
    "DenseSize",
    "ModuleSpec",
    "Producer",
    "Schema",
    "SchemaError",
    "checksum",
    "stored_shapes",
]

QUANT_METHOD = "cur"
SCHEMA_VERSION = 2
# Of a checkpoint whose sizes are all as `config.json` builds them: older readers know it.
_BEFORE_RESIZED = 1
_NEWER = "needs a newer cur-modifier. Upgrade it: pip install -U cur-modifier."
_EDITED = "config.json was edited, or belongs to another checkpoint."


class SchemaError(ValueError):
    """A ``quantization_config`` that this version cannot read."""


class ModuleSpec(BaseModel):
    """One factored Linear: ``out_features × in_features`` at ``rank``.

    Attributes:
        form: a name in :data:`~.sizes.FORMS`.
        direct_outputs: where a row ID's skeleton is shared, how many of its rows are outputs of
            this module: each is one of one module at most. None where it is not shared: then all
            are this module's.
        shared_skeleton: the module whose skeleton this one uses, e.g. q's in k and v of a layer.
            None in the module that has it.
        resized: whether ``config.json``'s own fields give the Linear other sizes than these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: str
    rank: int = Field(ge=1)
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    bias: bool = False
    direct_outputs: int | None = Field(default=None, ge=0)
    shared_skeleton: str | None = None
    resized: bool = False

    @model_validator(mode="before")
    @classmethod
    def _unused_variants(cls, given: Any) -> Any:
        """The first schema had two variants that nothing ever wrote otherwise than so."""
        if not isinstance(given, dict):
            return given
        only = {"axis": "row", "order": "stored"}
        for key, value in only.items():
            if given.get(key, value) not in (None, value):
                raise ValueError(f"form '{given.get('form')}' with {key} {given[key]!r} {_NEWER}")
        return {key: value for key, value in given.items() if key not in only}

    @field_validator("form")
    @classmethod
    def _known(cls, form: str) -> str:
        if form not in FORMS:
            raise ValueError(f"form '{form}' {_NEWER} This one reads {', '.join(FORMS)}.")
        return form

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        if self.direct_outputs is None:
            limit, of = min(self.in_features, self.out_features), "min(out_features, in_features)"
        else:  # the skeleton holds outputs of other modules, too
            limit, of = self.in_features, "in_features"
        if self.rank > limit:
            raise ValueError(f"rank {self.rank} is above {of} = {limit}")
        return self

    @model_validator(mode="after")
    def _direct_outputs_fit(self) -> Self:
        limit = min(self.rank, self.out_features)
        if self.direct_outputs is not None and self.direct_outputs > limit:
            raise ValueError(
                f"direct_outputs {self.direct_outputs} is above min(rank, out_features) = {limit}"
            )
        return self

    @property
    def sizes(self) -> Sizes:
        """The shapes of its form."""
        return FORMS[self.form]

    @property
    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """Weight shape ``(out, in)`` of every factor, by the child's name.

        A factor's tensors may be stored packed by compressed-tensors, under its names
        (``cur_c.weight_packed``, …).
        """
        return self.sizes.factors(self)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor below the module's name, as if none were quantized."""
        return self.sizes.tensors(self, bias=self.bias)


class DenseSize(BaseModel):
    """Sizes of a dense Linear or a convolution to which ``config.json``'s own fields give others.

    Attributes:
        transposed: its weight is stored as ``(in_features, out_features)``, as by transformers'
            ``Conv1D``.
        kernel_size: of a convolution of images, whose features are channels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    out_features: int = Field(ge=1)
    in_features: int = Field(ge=1)
    transposed: bool = False
    kernel_size: tuple[int, int] | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight as it is stored where it is not quantized."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else (*shape, *(self.kernel_size or ()))


class Producer(BaseModel):
    """Who wrote a checkpoint: an object with a name, as ModelOpt has it and vLLM expects it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = ""
    version: str = ""


class Schema(BaseModel):
    """The whole ``quantization_config`` of a checkpoint with factored or resized Linears.

    Attributes:
        version: the lowest one that has all entries which are used.
        modules: the factored Linears by name.
        resized: the dense Linears and convolutions by name to which ``config.json``'s own fields
            give other sizes.
        norms: features of the batch norms by name, where those fields give another number.
        attributes: plain integers of modules, by the module's name and the attribute's, to which
            those fields give other values: numbers of heads, and of features that are split.
        files: SHA-256 of every weights file by name. Where it is empty, nothing is compared.
        compressed_tensors: how factors and other layers are quantized, as compressed-tensors
            wrote it.
    """

    model_config = ConfigDict(extra="forbid")

    quant_method: Literal["cur"] = "cur"
    version: int = SCHEMA_VERSION
    producer: Producer = Field(default_factory=Producer)
    modules: dict[str, ModuleSpec]
    resized: dict[str, DenseSize] = Field(default_factory=dict)
    norms: dict[str, Annotated[StrictInt, Field(ge=1)]] = Field(default_factory=dict)
    attributes: dict[str, dict[str, Annotated[StrictInt, Field(ge=0)]]] = Field(
        default_factory=dict
    )
    files: dict[str, str] = Field(default_factory=dict)
    compressed_tensors: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _factored_or_dense(self) -> Self:
        both = sorted(self.modules.keys() & self.resized.keys())
        if both:
            raise ValueError(
                f"{both[0]} is in 'modules' and in 'resized': it is factored or dense. {_EDITED}"
            )
        return self

    @model_validator(mode="after")
    def _lowest_version(self) -> Self:
        self.version = SCHEMA_VERSION if self.has_own_sizes else _BEFORE_RESIZED
        return self

    @property
    def has_own_sizes(self) -> bool:
        """Whether ``config.json``'s own fields give any module other sizes or counts."""
        factored = any(module.resized for module in self.modules.values())
        return factored or bool(self.resized or self.norms or self.attributes)

    @classmethod
    def read(cls, section: dict[str, Any]) -> Self:
        """Parse a ``quantization_config``.

        Raises:
            SchemaError: an unknown schema version, or a section that does not fit the schema; it
                names the entry.
        """
        version = section.get("version")
        if version not in (_BEFORE_RESIZED, SCHEMA_VERSION):
            raise SchemaError(
                f"quantization_config has schema version {version!r}; this cur-modifier reads "
                f"versions {_BEFORE_RESIZED} and {SCHEMA_VERSION}. Upgrade it (pip install -U "
                "cur-modifier), or compress the model again. The checkpoint was written by "
                f"{section.get('producer')!r}."
            )
        try:
            return cls.model_validate(section)
        except ValidationError as error:
            raise SchemaError(f"quantization_config does not fit the schema: {error}") from error

    def write(self) -> dict[str, Any]:
        """The JSON form, with defaults left out of the modules' entries."""
        section = self.model_dump(
            mode="json", exclude={"modules", "resized", "norms", "attributes"}
        )
        section["modules"] = {
            name: {
                **module.model_dump(mode="json", exclude_defaults=True),
                "bias": module.bias,
            }
            for name, module in self.modules.items()
        }
        if self.resized:
            section["resized"] = {
                name: size.model_dump(mode="json", exclude_defaults=True)
                for name, size in self.resized.items()
            }
        if self.norms:
            section["norms"] = self.norms
        if self.attributes:
            section["attributes"] = self.attributes
        return section

    def check_supported(self) -> None:
        """Refuse what this version does not build, or nobody can.

        Raises:
            SchemaError: it names the module and the variant, or the modules of which one can't use
                the other's skeleton.
        """
        for name, module in self.modules.items():
            shared = module.direct_outputs is not None or module.shared_skeleton is not None
            if shared and not module.sizes.shares_skeletons:
                raise SchemaError(
                    f"{name}: form '{module.form}' with a shared skeleton "
                    f"({module.shared_skeleton!r}) {_NEWER}"
                )
        for leader, sharing in self._sharing().items():
            rank = self.modules[leader].rank
            outputs = [self.modules[name].direct_outputs or 0 for name in sharing]
            if sum(outputs) > rank:
                raise SchemaError(
                    f"{' and '.join(sharing)} share a skeleton of rank {rank}, but their "
                    f"direct_outputs {outputs} add up to {sum(outputs)}. {_EDITED}"
                )

    def _sharing(self) -> dict[str, list[str]]:
        """Names of the modules that share a skeleton, by the name of the one that has it."""
        sharing = {
            name: [name]
            for name, module in self.modules.items()
            if module.direct_outputs is not None and module.shared_skeleton is None
        }
        for name, module in self.modules.items():
            if module.shared_skeleton is None:
                continue
            leader = self.modules.get(module.shared_skeleton)
            if leader is None:
                problem = "which is not among the factored modules"
            elif leader.shared_skeleton is not None:
                problem = f"which itself uses that of {leader.shared_skeleton}"
            elif leader.direct_outputs is None:
                problem = "which does not share one (it has no direct_outputs)"
            elif module.direct_outputs is None:
                problem = "but has no direct_outputs"
            elif leader.rank != module.rank:
                problem = f"whose rank is {leader.rank}; its own is {module.rank}"
            elif leader.in_features != module.in_features:
                problem = f"which has {leader.in_features} inputs; its own are {module.in_features}"
            else:
                sharing[module.shared_skeleton].append(name)
                continue
            raise SchemaError(
                f"{name} uses the skeleton of {module.shared_skeleton}, {problem}. {_EDITED}"
            )
        return sharing

    def check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the tensors of a checkpoint, by name and shape, with what this schema asks for.

        Raises:
            SchemaError: a missing tensor, or one whose shape disagrees.
        """
        self.check_supported()
        for name, module in self.modules.items():
            for key, shape in module.tensor_shapes.items():
                _check_tensor(shapes, f"{name}.{key}", shape, f"rank {module.rank}")
        for name, size in self.resized.items():
            given = f"{size.out_features} outputs of {size.in_features} inputs"
            _check_tensor(shapes, f"{name}.weight", size.weight_shape, given)
            if f"{name}.bias" in shapes:
                _check_tensor(shapes, f"{name}.bias", (size.out_features,), given)
        for name, features in self.norms.items():
            for key in ("weight", "bias", "running_mean", "running_var"):
                if f"{name}.{key}" in shapes:
                    _check_tensor(shapes, f"{name}.{key}", (features,), f"{features} features")

    def check_files(self, directory: Path) -> None:
        """Compare the weights files in ``directory`` with their checksums; reads all of them.

        Raises:
            SchemaError: a file that is missing or was changed.
        """
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                raise SchemaError(f"{path} is missing. Download or save the checkpoint again.")
            if checksum(path) != expected:
                raise SchemaError(
                    f"{path} is not the file that was saved: its checksum differs from "
                    "config.json's 'files'. Download or save it again, or remove that entry if the "
                    "change is meant."
                )


def _check_tensor(
    shapes: Mapping[str, tuple[int, ...]], name: str, shape: tuple[int, ...], given: str
) -> None:
    """Compare one tensor with the shape that follows from what is ``given`` in config.json."""
    # compressed-tensors packs the inputs of a weight; its rows stay rows.
    packed = shapes.get(f"{name}_packed")
    found = shapes.get(name, packed and (packed[0], *shape[1:]))
    if found is None:
        raise SchemaError(f"{name} is missing from the checkpoint. Download or save it again.")
    if tuple(found) != shape:
        raise SchemaError(
            f"{name} has shape {tuple(found)}; config.json gives {given}, so {shape}. {_EDITED}"
        )


def stored_shapes(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in safetensors ``files`` by name, from their headers alone.

    Raises:
        SchemaError: a file that is truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open  # a reader of config.json alone goes without

    shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    shapes[key] = tuple(tensors.get_slice(key).get_shape())
        except SafetensorError as error:
            raise SchemaError(
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
