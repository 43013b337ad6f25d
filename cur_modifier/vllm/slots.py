"""Where vLLM's loaders find the tensors of a factored Linear's parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.utils import set_weight_attrs

from cur_modifier.forms.schema import SchemaError
from cur_modifier.vllm.parts import Part

__all__ = ["DAMAGED", "Slots", "check_finite"]

DAMAGED = "The files were changed or damaged: download or save the checkpoint again."

# vLLM's own parameter of this name takes the tensors that are called so.
_BIAS = "bias"


class Slots:
    """Where vLLM's loaders find the checkpoint's tensors of one Linear.

    vLLM looks up ``q_proj.cur_c.weight`` as ``qkv_proj.cur_c.weight`` and hands over a shard id.
    So each name is an empty parameter whose loader passes the tensor on by that id. All are gone
    after loading.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.loaders: dict[str, dict[Any, tuple[str, Callable[[torch.Tensor], None]]]] = {}
        self.missing: set[str] = set()

    def declare(
        self,
        part: Part,
        child: str,
        linear: LinearBase,
        load: Callable[[nn.Parameter, torch.Tensor], None] | None = None,
    ) -> None:
        """A slot for every parameter of ``linear``."""
        for name, param in linear.named_parameters(recurse=False):
            key = f"{child}.{name}" if child else name
            loader = load or param.weight_loader
            self.add(part, key, partial(_load, part, key, linear, loader, param), param.dtype)

    def add(
        self,
        part: Part,
        key: str,
        load: Callable[[torch.Tensor], None],
        dtype: torch.dtype = torch.int32,
    ) -> None:
        """A slot for ``<part>.<key>``."""
        if key not in self.loaders:
            self.loaders[key] = {}
            slot = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            set_weight_attrs(slot, {"weight_loader": partial(self._receive, key)})
            holder, _, name = key.rpartition(".")
            if holder and not hasattr(self.layer, holder):
                self.layer.add_module(holder, nn.Module())
            self.layer.get_submodule(holder).register_parameter(name, slot)
        self.loaders[key][part.shard_id] = (part.name, load)
        self.missing.add(f"{part.name}.{key}")

    def add_bias(self, part: Part) -> None:
        """Where a factor holds the part's bias, a slot that hands it to the layer's bias, which
        vLLM makes after the weights."""
        if part.spec is None or not part.spec.bias or part.spec.sizes.bias == _BIAS:
            return
        shard = () if part.shard_id is None else (part.shard_id,)

        def load(tensor: torch.Tensor) -> None:
            bias = self.layer.bias
            if bias is None:
                raise SchemaError(
                    f"config.json says that {part.name} has a bias, and vLLM's model has none "
                    "there. config.json was edited, or belongs to another checkpoint."
                )
            bias.weight_loader(bias, tensor, *shard)

        self.add(part, part.spec.sizes.bias, load)

    def _receive(
        self, key: str, slot: nn.Parameter, tensor: torch.Tensor, shard_id: Any = None
    ) -> None:
        if shard_id not in self.loaders[key]:
            known = ", ".join(name for name, _ in self.loaders[key].values())
            raise SchemaError(
                f"the checkpoint has a '{key}' for shard {shard_id!r} of {self.layer.prefix}; "
                f"config.json gives one to {known} only. {DAMAGED}"
            )
        name, load = self.loaders[key][shard_id]
        load(tensor)
        self.missing.discard(f"{name}.{key}")

    def close(self) -> None:
        """Remove the slots.

        Raises:
            SchemaError: a tensor that never came; it would be served as noise.
        """
        if self.missing:
            if len(self.missing) == sum(len(loaders) for loaders in self.loaders.values()):
                raise SchemaError(
                    f"no tensor of {self.layer.prefix} was loaded. The checkpoint is incomplete, "
                    "or vLLM did not read it: the plugin can't serve factors that --load-format "
                    "dummy makes up."
                )
            raise SchemaError(
                f"{sorted(self.missing)[0]} is missing from the checkpoint"
                f"{f' (and {len(self.missing) - 1} more)' if len(self.missing) > 1 else ''}. "
                "Download or save it again."
            )
        for key in self.loaders:
            holder, _, name = key.rpartition(".")
            if not holder:
                delattr(self.layer, name)
            elif hasattr(self.layer, holder):
                delattr(self.layer, holder)
        self.loaders = {}
        # What vLLM notes of the slots would keep the layer, and with it the model, for ever.
        self.layer = None


def _load(
    part: Part,
    key: str,
    linear: LinearBase,
    loader: Callable[..., None],
    param: nn.Parameter,
    tensor: torch.Tensor,
) -> None:
    """Load one tensor, or say which it was that did not fit."""
    check_finite(part, key, tensor)
    # The layer above has marked the parameters of all below it with its own rank and size.
    linear.update_param_tp_status()
    try:
        loader(param, tensor)
    except SchemaError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise SchemaError(
            f"{part.name}.{key} has shape {tuple(tensor.shape)}, which does not fit config.json "
            f"({error}). {DAMAGED}"
        ) from error


def check_finite(part: Part, key: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor with numbers that are not finite."""
    if not tensor.is_floating_point():
        return
    # A sum that is finite says so fifty times faster.
    if not (bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())):
        raise SchemaError(f"{part.name}.{key} holds numbers that are not finite. {DAMAGED}")
