"""Small vLLM Linears with factored parts: the plugin's tests build, load and compare them.

vLLM's own loaders and kernels run; the rest of a model is left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

from cur_modifier.forms.schema import DenseSize, ModuleSpec, Schema, SchemaError
from cur_modifier.vllm.config import KEEP_FACTORS, CURQuantizationConfig

WIDTH, HEAD, GROUP = 32, 8, 32
BLOCK = "model.layers.0.block"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
FORMS = ("dense", "cur", "id", "low_rank")
FACTORED = FORMS[1:]

QKV = {"q_proj": 4 * HEAD, "k_proj": 2 * HEAD, "v_proj": 2 * HEAD}
QKV_SIZES = (WIDTH, HEAD, 4, 2)
GROUPS = [("q_proj", "k_proj", "v_proj"), *itertools.combinations(QKV, 2)]


def refused(message: str, kind: type[Exception] = SchemaError) -> Any:
    """The context of what raises an error of that kind that says ``message``."""
    return pytest.raises(kind, match=re.escape(message))


def inputs(width: int = WIDTH) -> torch.Tensor:
    """Inputs ``(5, width)``, the same each time."""
    return torch.randn(5, width, generator=torch.Generator().manual_seed(9))


def rounded_inputs(width: int) -> torch.Tensor:
    """:func:`inputs` that are exact in bfloat16."""
    return inputs(width).bfloat16().float()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of their difference, by the norm of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


class Example:
    """A dense Linear of random weights, as a part of the given form: tensors and exact product."""

    def __init__(
        self,
        form: str,
        out: int,
        seed: int,
        *,
        width: int = WIDTH,
        bias: bool = False,
        rank: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        rank = rank or 3 + seed % 4  # parts of one module have ranks of their own
        self.spec: ModuleSpec | None = None
        self.tensors: dict[str, torch.Tensor] = {}
        self.bias = random(out) if bias else None
        if form == "dense":
            self.tensors["weight"] = self.product = random(out, width)
        else:
            self.spec = ModuleSpec(
                form=form, rank=rank, in_features=width, out_features=out, bias=bias
            )
            indices = torch.arange(rank, dtype=torch.int32)
            if form == "cur":
                c, u, r = random(out, rank), random(rank, rank), random(rank, width)
                self.tensors |= {"cur_c.weight": c, "cur_u.weight": u, "cur_r.weight": r}
                self.tensors |= {"rows": indices, "columns": indices}
                self.product = c @ u @ r
            elif form == "low_rank":
                a, b = random(out, rank), random(rank, width)
                self.tensors |= {"lr_a.weight": a, "lr_b.weight": b}
                self.product = a @ b
            else:
                s, t = random(rank, width), random(out - rank, rank)
                order = torch.randperm(out, generator=generator)
                self.tensors |= {"id_s.weight": s, "id_t.weight": t, "order": order.int()}
                self.product = torch.cat([s, t @ s])[order]
        if self.bias is not None:
            self.tensors["bias" if self.spec is None else self.spec.sizes.bias] = self.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.product, self.bias)

    def quantize(self, child: str, scheme: str) -> torch.Tensor:
        """Store a factor as compressed-tensors would; gives its dequantized weight."""
        weight = self.tensors.pop(f"{child}.weight")
        bits = 4 if scheme.startswith("W4") else 8
        groups = weight.unflatten(1, (-1, GROUP if bits == 4 else weight.shape[1]))
        limit = 2 ** (bits - 1)
        scale = (groups.abs().amax(-1, keepdim=True) / limit).bfloat16().float()
        integers = (groups / scale).round().clamp(-limit, limit - 1)
        stored = integers.flatten(1).to(torch.int8)
        if bits == 8:
            self.tensors[f"{child}.weight"] = stored
            self.tensors[f"{child}.weight_scale"] = scale[..., 0]
        else:
            self.tensors[f"{child}.weight_packed"] = pack_to_int32(stored, 4)
            self.tensors[f"{child}.weight_scale"] = scale[..., 0].bfloat16()
            self.tensors[f"{child}.weight_shape"] = torch.tensor(weight.shape)
        if scheme == "W4A16_ASYM":
            zeros = torch.zeros(scale.shape[:2], dtype=torch.int8)
            self.tensors[f"{child}.weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0)
        return (integers * scale).flatten(1)


def sharing(
    outs: dict[str, int],
    leader: str,
    rank: int,
    *,
    width: int = WIDTH,
    direct: dict[str, int] | None = None,
    schemes: dict[str, str] | None = None,
    bias: bool = False,
) -> dict[str, Example]:
    """Examples of ``outs`` outputs each that share the leader's skeleton.

    Args:
        direct: how many rows of the skeleton each has as outputs; by default at random.
        schemes: quantizes S and T of the modules named.
    """
    generator = torch.Generator().manual_seed(rank)
    m = sum(outs.values())
    if direct is None:  # as a joint decomposition does it: some outputs are the skeleton's rows
        joint = torch.randperm(m, generator=generator)
    else:
        spare = iter(range(rank, m))
        own = iter(range(rank))
        joint = torch.tensor(
            [
                next(own) if i < direct[name] else next(spare)
                for name, out in outs.items()
                for i in range(out)
            ]
        )
    examples = {}
    for seed, ((name, out), order) in enumerate(
        zip(outs.items(), joint.split(list(outs.values())), strict=True)
    ):
        example = examples[name] = Example("dense", out, seed, width=width, bias=bias)
        example.tensors.pop("weight")
        rest = order >= rank
        example.spec = ModuleSpec(
            form="id",
            rank=rank,
            in_features=width,
            out_features=out,
            bias=bias,
            direct_outputs=out - int(rest.sum()),
            shared_skeleton=None if name == leader else f"{BLOCK}.{leader}",
        )
        order = torch.where(rest, rank + rest.cumsum(0) - 1, order)
        example.tensors["order"] = order.int()
        if rest.any():
            example.tensors["id_t.weight"] = torch.randn(int(rest.sum()), rank, generator=generator)
    s = torch.randn(rank, width, generator=generator)
    examples[leader].tensors["id_s.weight"] = s
    schemes = schemes or {}
    if leader in schemes:
        s = examples[leader].quantize("id_s", schemes[leader])
    for name, example in examples.items():
        t = example.tensors.get("id_t.weight", torch.empty(0, rank))
        if name in schemes and len(t):
            t = example.quantize("id_t", schemes[name])
        example.product = torch.cat([s, t @ s])[example.tensors["order"].long()]
    return examples


def compressed_tensors(schemes: dict[str, str]) -> dict[str, Any]:
    """The section of a checkpoint whose modules are quantized so."""
    groups: dict[str, Any] = {}
    for scheme in set(schemes.values()):
        eight = scheme == "W8A8"
        common = {"num_bits": 8 if eight else 4, "type": "int"}
        weights = common | {
            "symmetric": scheme != "W4A16_ASYM",
            "strategy": "channel" if eight else "group",
        }
        activations = common | {"symmetric": True, "strategy": "token", "dynamic": True}
        groups[scheme] = {
            "targets": [
                f"re:.*{name}.(id_[st]|lr_[ab])$" for name, s in schemes.items() if s == scheme
            ],
            "weights": weights if eight else weights | {"group_size": GROUP},
            "input_activations": activations if eight else None,
            "format": "int-quantized" if eight else "pack-quantized",
        }
    return {"config_groups": groups, "format": "pack-quantized", "ignore": []}


def schema_of(
    examples: dict[str, Example], section: dict[str, Any] | None = None, *, resized: bool = False
) -> Schema:
    """What a checkpoint of the examples says of itself."""
    modules = {
        f"{BLOCK}.{name}": example.spec.model_copy(update={"resized": resized})
        for name, example in examples.items()
        if example.spec is not None
    }
    dense = {}
    for name, example in examples.items():
        m, n = example.product.shape
        if resized and example.spec is None:
            dense[f"{BLOCK}.{name}"] = DenseSize(out_features=m, in_features=n)
    return Schema(modules=modules, resized=dense, compressed_tensors=section)


@contextmanager
def built(
    kind: type,
    name: str,
    examples: dict[str, Example],
    *sizes: Any,
    section: dict[str, Any] | None = None,
    keep_factors: bool = True,
    resized: bool = False,
    **kwargs: Any,
) -> Iterator[Any]:
    """A vLLM Linear with the examples as parts, not loaded yet. At their size it would be served
    dense by default. Where they are ``resized``, ``sizes`` are those of the model's config."""
    config = CURQuantizationConfig(schema_of(examples, section, resized=resized))
    config.packed_modules_mapping = FUSED
    bias = any(example.bias is not None for example in examples.values())
    settings = {KEEP_FACTORS: True} if keep_factors else {}
    with set_current_vllm_config(VllmConfig(additional_config=settings)):
        yield kind(
            *sizes,
            bias=bias,
            quant_config=config,
            prefix=f"{BLOCK}.{name}",
            return_bias=False,
            **kwargs,
        )


def load(layer: Any, examples: dict[str, Example], *, skip: str = "") -> None:
    """Hand over the tensors as vLLM's loader does, and let the layers prepare themselves."""
    hand_over(layer, examples, skip=skip)
    for module in list(layer.modules()):  # parents first, as vLLM goes
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)


def hand_over(layer: Any, examples: dict[str, Example], *, skip: str = "") -> None:
    """Hand over the tensors as vLLM's loader does."""
    ids: list[Any] = [None]
    if len(examples) > 1:
        ids = ["q", "k", "v"] if isinstance(layer, QKVParallelLinear) else [0, 1]
    parameters = dict(layer.named_parameters())
    for shard, (name, example) in zip(ids, examples.items(), strict=True):
        for key, tensor in example.tensors.items():
            if f"{name}.{key}" != skip:
                arguments = () if shard is None else (shard,)
                parameters[key].weight_loader(parameters[key], tensor, *arguments)


@contextmanager
def pretend(rank: int, size: int) -> Iterator[None]:
    """Make Linears as on one of several ranks. They must not communicate."""
    with ExitStack() as stack:
        for module in (linear, parameter):
            for name, value in (("rank", rank), ("world_size", size)):
                function = f"get_tensor_model_parallel_{name}"
                stack.enter_context(mock.patch.object(module, function, lambda value=value: value))
        yield


def compare(layer: Any, examples: dict[str, Example], width: int = WIDTH) -> None:
    """The layer gives the products side by side."""
    x = inputs(width)
    wanted = torch.cat([example(x) for example in examples.values()], -1)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


def one_of_each_form() -> dict[str, Example]:
    """q, k and v as a row ID, CUR and a dense weight."""
    return {
        "q_proj": Example("id", 32, 0),
        "k_proj": Example("cur", 16, 1),
        "v_proj": Example("dense", 16, 2),
    }


def linears_below(layer: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the Linears that a factored one is made of."""
    return {
        path: (module.input_size, module.output_size)
        for path, module in layer.named_modules()
        if path and isinstance(module, LinearBase)
    }


def grouped(
    group: tuple[str, ...], leader: str, form: str, *, bias: bool = False, rank: int = 20
) -> dict[str, Example]:
    """q, k and v: those of the group share a skeleton, which the leader has; another form else."""
    shared = sharing({name: QKV[name] for name in group}, leader, rank, bias=bias)
    others = {n: Example(form, QKV[n], seed, bias=bias) for seed, n in enumerate(QKV)}
    return {name: shared.get(name, others[name]) for name in QKV}


def outputs_of(examples: dict[str, Example], x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What one of several ranks computes of q, k and v, with two heads of key and value."""
    mine = []
    for name, example in examples.items():
        pieces = size if name == "q_proj" else min(size, 2)
        mine.append(example(x).chunk(pieces, -1)[rank * pieces // size])
    return torch.cat(mine, -1)


def quantized(
    schemes: dict[str, str],
    direct: dict[str, int],
    x: torch.Tensor,
    *,
    leader: str = "q_proj",
    rank: int = 0,
    size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """What q, k and v of a shared skeleton give in bfloat16, what they should, and their Linear."""
    outs = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    width = x.shape[-1]
    examples = sharing(outs, leader, 32, width=width, direct=direct, schemes=schemes)
    layers = built(
        QKVParallelLinear,
        "qkv_proj",
        examples,
        width,
        16,
        4,
        2,
        section=compressed_tensors(schemes),
        keep_factors=False,  # which are kept nevertheless
        params_dtype=torch.bfloat16,
    )
    with pretend(rank, size), layers as layer:
        load(layer, examples)
    wanted = outputs_of(examples, x, rank, size)
    return layer(x.bfloat16()).float(), wanted, layer
