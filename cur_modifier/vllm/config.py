"""The quantization method ``cur`` of vLLM: which Linears are factored, which are resized, and who
runs the others.

Nothing of vLLM is patched. Modules that are not factored go where compressed-tensors sends them, or
to vLLM's unquantized method. So do resized ones, after their Linear got its true sizes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from cur_modifier.forms.schema import (
    QUANT_METHOD,
    DenseSize,
    ModuleSpec,
    Schema,
    SchemaError,
    stored_shapes,
)

__all__ = ["KEEP_FACTORS", "CURQuantizationConfig"]

# In vLLM's `--additional-config`: serve the factors also where one dense product would be faster.
KEEP_FACTORS = "cur_keep_factors"


class CURQuantizationConfig(QuantizationConfig):
    """A factored checkpoint's ``quantization_config``.

    Attributes:
        modules: the factored Linears by the name that vLLM gives them.
        resized: the dense Linears of other sizes than config.json's own fields give, likewise.
        inner: how the factors and the other layers are quantized; None where nothing is.
    """

    def __init__(self, schema: Schema) -> None:
        self.inner: QuantizationConfig | None = None
        if schema.compressed_tensors:
            self.inner = get_quantization_config("compressed-tensors").from_config(
                copy.deepcopy(schema.compressed_tensors)  # which it changes
            )
        super().__init__()
        self.schema = schema
        self.modules = dict(schema.modules)
        self.resized = dict(schema.resized)
        self._claimed: set[str] = set()
        self._pipeline = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Read the section of ``config.json``.

        Raises:
            SchemaError: an unknown schema version, or a variant that this version does not serve.
        """
        schema = Schema.read(config)
        schema.check_supported()
        return cls(schema)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        ours = [torch.float32, torch.bfloat16, torch.float16]
        theirs = self.inner.get_supported_act_dtypes() if self.inner else ours
        return [dtype for dtype in ours if dtype in theirs]

    @classmethod
    def get_min_capability(cls) -> int:
        return get_quantization_config("compressed-tensors").get_min_capability()

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @property
    def packed_modules_mapping(self) -> dict[str, list[str]]:
        """Checkpoint names of what vLLM fuses, by the fused module's name; vLLM writes it."""
        return self._packed

    @packed_modules_mapping.setter
    def packed_modules_mapping(self, value: dict[str, list[str]]) -> None:
        self._packed = value
        if self.inner is not None:
            self.inner.packed_modules_mapping = value

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Compare the files with ``config.json`` before anything is built.

        A checkpoint whose weights are elsewhere (on the hub, in a bucket) is checked as its tensors
        arrive.
        """
        super().maybe_update_config(model_name, hf_config=hf_config, revision=revision)
        if files := sorted(Path(model_name).glob("*.safetensors")):
            self.schema.check_tensors(stored_shapes(files))
            self.schema.check_files(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call the modules what vLLM's model class calls them."""
        self.modules = {
            name: module.model_copy(
                update={"shared_skeleton": hf_to_vllm_mapper.map_name(module.shared_skeleton)}
            )
            if module.shared_skeleton
            else module
            for name, module in hf_to_vllm_mapper.apply_dict(self.modules).items()
        }
        self.resized = hf_to_vllm_mapper.apply_dict(self.resized)
        if self.inner is not None:
            self.inner.apply_vllm_mapper(hf_to_vllm_mapper)
        self._check_tensor_parallel()

    def get_checkpoint_weight_mapper(self) -> Any:
        """As the base class. vLLM asks for it when the model is built, before the first weight."""
        self.check_claimed()
        return super().get_checkpoint_weight_mapper()

    def check_claimed(self) -> None:
        """Every factored or resized module has been given to a Linear.

        Raises:
            SchemaError: one that the model class has no Linear for; its tensors could be skipped
                without a word.
        """
        missing = sorted({*self.modules, *self.resized} - self._claimed)
        if missing and not self._pipeline:  # there each rank builds some of the layers
            raise SchemaError(
                f"config.json says that {missing[0]} is {self._kind(missing[0])}"
                f"{f' (and {len(missing) - 1} more)' if missing[1:] else ''}, but the model that "
                "vLLM built has no Linear of that name. Is it an expert of a mixture, or a part "
                "that vLLM merges in a way of its own? Compress the model again without it."
            )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for a Linear with at least one factored part, else compressed-tensors' or
        vLLM's own. The Linear first gets the sizes that its parts have.

        Raises:
            SchemaError: factored or resized modules inside a layer that is no Linear, sizes that
                the Linear can't have, or a skeleton that is shared with a module outside it.
            ValueError: a setting of ours in ``--additional-config`` that is neither true nor false.
        """
        from vllm.model_executor.layers.attention import Attention, MLAAttention
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from cur_modifier.vllm.method import FactoredLinearMethod
        from cur_modifier.vllm.resize import check_attention, resize

        if self.inner is not None:
            from cur_modifier.vllm.kernels import replace_unfit

            replace_unfit()
        if isinstance(layer, LinearBase):
            names = self._parts(prefix)
            if not self._own.keys().isdisjoint(names):
                self._claimed.update(names)
                current = get_current_vllm_config()
                self._pipeline = current.parallel_config.pipeline_parallel_size > 1
                resize(layer, {name: self._own_size(name) for name in names})
            specs = {name: self.modules.get(name) for name in names}
            if any(specs.values()):
                self._check_skeletons(prefix, names)
                kept = _keeps_factors(current.additional_config)
                return FactoredLinearMethod(
                    specs, self.inner, self.check_claimed, keep_factors=kept
                )
        elif prefix and (inside := [m for m in self._own if m.startswith(f"{prefix}.")]):
            raise SchemaError(
                f"{inside[0]} is {self._kind(inside[0])}, but vLLM runs it inside {prefix} as one "
                f"{type(layer).__name__}, which this plugin does not serve. Compress the model "
                f"again with 're:.*{prefix.rpartition('.')[2]}.*' in the stage's ignore."
            )
        elif isinstance(layer, Attention | MLAAttention):
            check_attention(prefix, {n: size for n in self._own if (size := self._own_size(n))})
        if self.inner is not None:
            return self.inner.get_quant_method(layer, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    @property
    def _own(self) -> dict[str, ModuleSpec | DenseSize]:
        """What config.json says something of, by the name that vLLM gives it."""
        return {**self.modules, **self.resized}

    def _kind(self, name: str) -> str:
        return "factored" if name in self.modules else "resized"

    def _own_size(self, name: str) -> tuple[int, int] | None:
        """``(out_features, in_features)``; None where config.json's own fields give them."""
        entry = self._own.get(name)
        if entry is None or (isinstance(entry, ModuleSpec) and not entry.resized):
            return None
        return entry.out_features, entry.in_features

    def _check_skeletons(self, prefix: str, names: list[str]) -> None:
        """A skeleton is computed where it is used: in one Linear of vLLM's."""
        for name in names:
            leader = name in self.modules and self.modules[name].shared_skeleton
            if leader and leader not in names:
                raise SchemaError(
                    f"{name} uses the skeleton of {leader}, which vLLM does not run in the same "
                    f"Linear ({prefix}). This plugin serves skeletons that are shared within q/k/v "
                    "or within gate/up, where vLLM fuses them. Compress the model again with a "
                    "skeleton of its own for each of the two."
                )

    def _parts(self, prefix: str) -> list[str]:
        """Checkpoint names of the Linears that the one called ``prefix`` holds, in its order."""
        if prefix in self.modules or prefix in self.resized:
            return [prefix]
        parent, dot, child = prefix.rpartition(".")
        return [f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(child, [child])]

    def _check_tensor_parallel(self) -> None:
        """Say what does not divide while its name is known: vLLM's own assertions do not.

        A part of a fused module is split by its outputs, a module that writes the residual stream
        by its inputs. Attention goes by heads.
        """
        config = get_current_vllm_config()
        size = config.parallel_config.tensor_parallel_size
        heads = config.model_config.get_total_num_kv_heads()
        width = config.model_config.get_hidden_size()
        for name, module in self._own.items():
            if name.endswith((".q_proj", ".k_proj", ".v_proj", ".qkv_proj")):
                if heads % size and size % heads:
                    raise SchemaError(
                        f"{name}: {heads} key/value heads can be neither split over nor repeated "
                        f"on {size} ranks. Use a --tensor-parallel-size that divides {heads}, or "
                        "that it divides."
                    )
            elif (dimension := _split_dimension(module, width)) and dimension % size:
                raise SchemaError(
                    f"{name}: {dimension} does not divide by {size} ranks. Use a "
                    f"--tensor-parallel-size that divides {dimension}."
                )


def _keeps_factors(settings: Any) -> bool:
    kept = settings.get(KEEP_FACTORS, False) if isinstance(settings, dict) else False
    if not isinstance(kept, bool):
        raise ValueError(
            f"{KEEP_FACTORS} is {kept!r}; it is true or false: --additional-config "
            f"'{{\"{KEEP_FACTORS}\": true}}'"
        )
    return kept


def _split_dimension(module: ModuleSpec | DenseSize, width: int) -> int | None:
    """What tensor parallelism splits, as far as the shape alone tells."""
    if module.in_features == width < module.out_features:  # a router's few outputs are not split
        return module.out_features
    if module.out_features == width != module.in_features:
        return module.in_features
    return None
