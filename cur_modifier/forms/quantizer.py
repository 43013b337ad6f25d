"""The quantizer ``cur``: ``from_pretrained`` rebuilds the factored and resized modules of a
checkpoint.

This file is also shipped inside checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from .registry import find_form
from .resize import resize, resize_norm, set_integers
from .schema import QUANT_METHOD, ModuleSpec, Schema, SchemaError, stored_shapes

__all__ = ["CURConfig", "CURQuantizer", "register"]

logger = logging.get_logger(__name__)


class CURConfig(QuantizationConfigMixin):
    """``quantization_config`` of a factored checkpoint.

    Raises:
        SchemaError: the section is not one that this version reads.
    """

    def __init__(self, **section: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.schema = Schema.read(section)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As the base class; the section is strict, so no keyword goes unused."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The section as it stands in ``config.json``."""
        return self.schema.write()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: every entry of the section is needed."""
        return self.to_dict()


class CURQuantizer(HfQuantizer):
    """Resizes modules of the empty model and swaps factored ones in, then lets compressed-tensors
    do its part."""

    requires_calibration = True
    quantization_config: CURConfig

    def __init__(self, quantization_config: CURConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        section = quantization_config.schema.compressed_tensors
        self.inner = (
            CompressedTensorsHfQuantizer(CompressedTensorsConfig.from_dict(section), **kwargs)
            if section
            else None
        )

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises:
        ImportError: factors are packed and compressed-tensors is missing.
        """
        if self.inner is not None:
            self.inner.validate_environment(*args, **kwargs)

    def update_tp_plan(self, config: Any) -> Any:
        """Also the first moment that the config passes through our hands: see
        `transformers_weights`.

        That entry names no file; it stops loaders that know nothing of CUR.
        """
        if getattr(config, "transformers_weights", None):
            del config.transformers_weights
        return config if self.inner is None else self.inner.update_tp_plan(config)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        schema = self.quantization_config.schema
        _check_files(schema, kwargs.get("checkpoint_files") or [])
        schema.check_supported()
        for name, size in schema.resized.items():
            resize(model, name, size)
        for name, features in schema.norms.items():
            resize_norm(model, name, features)
        for name, values in schema.attributes.items():
            set_integers(model, name, values)
        # Whoever uses another's skeleton comes after it.
        for name, module in sorted(
            schema.modules.items(), key=lambda m: bool(m[1].shared_skeleton)
        ):
            _swap(model, name, module, kwargs.get("dtype"))
        if self.inner is not None:
            self.inner._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.inner is not None:
            self.inner._process_model_after_weight_loading(model, **kwargs)

    def is_serializable(self) -> bool:
        """Not by this file alone: what it saved would say nothing to loaders that do not know CUR,
        and they would fill the missing weights with noise."""
        logger.warning(
            "A model with factored or resized modules is saved by the plugin: pip install "
            "cur-modifier, and import cur_modifier before the model is loaded."
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Factors train like any weight; packed ones do not."""
        return self.inner is None


def register() -> None:
    """Make the quantizer known to transformers. Harmless when repeated."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(CURConfig)
        register_quantizer(QUANT_METHOD)(CURQuantizer)


def _swap(model: nn.Module, name: str, module: ModuleSpec, dtype: torch.dtype | None) -> None:
    parent_name, _, child = name.rpartition(".")
    try:
        dense = model.get_submodule(name)
    except AttributeError:
        raise SchemaError(
            f"config.json says that {name} is factored, but {type(model).__name__} has no such "
            "module. The checkpoint belongs to another architecture or transformers version."
        ) from None
    if not isinstance(dense, nn.Linear):
        raise SchemaError(f"config.json says that {name} is factored; here it is no nn.Linear.")
    built = (dense.out_features, dense.in_features)
    if not module.resized and built != (module.out_features, module.in_features):
        raise SchemaError(
            f"config.json says that {name} is {module.out_features}x{module.in_features}, but the "
            f"model builds it as {built[0]}x{built[1]}. config.json was edited, "
            "or belongs to another checkpoint."
        )
    leader: Any = module.shared_skeleton and model.get_submodule(module.shared_skeleton)
    factored = find_form(module.form).build(
        module, bias=module.bias, leader=leader, device="meta", dtype=dtype
    )
    setattr(model.get_submodule(parent_name), child, factored)


def _check_files(schema: Schema, files: list[str]) -> None:
    """Refuse a checkpoint that lacks a factor or a resized weight: transformers would fill it with
    random numbers."""
    if not files:
        return
    shapes = stored_shapes(files)
    names = [*schema.modules, *schema.resized]
    if not any(key.startswith(tuple(f"{name}." for name in names)) for key in shapes):
        raise SchemaError(
            f"none of the {len(names)} modules that config.json calls factored or resized has a "
            f"tensor in {files[0]}. The weights and config.json are not of one checkpoint."
        )
    schema.check_tensors(shapes)
    schema.check_files(Path(files[0]).parent)
