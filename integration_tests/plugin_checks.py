"""Checks of the serving plugin on single vLLM Linears, in one process of the serving environment.

    .venvs/serve/bin/python integration_tests/plugin_checks.py

prints a JSON object: what went wrong in each check, or null. `test_serve_plugin.py` runs it; pytest
is not in that environment. Checks that need a server are in the other `test_serve_*` files.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # or W4A16 rounds activations where the CPU has AMX

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor import parameter
from vllm.model_executor.kernels.linear import (
    CPUInt8ScaledMMLinearKernel,
    CPUWNA16LinearKernel,
    Int8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    get_quantization_config,
)
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.models.utils import WeightsMapper

from cur_modifier.forms.schema import ModuleSpec, Schema, SchemaError
from cur_modifier.vllm import kernels, register
from cur_modifier.vllm.config import KEEP_FACTORS, CURQuantizationConfig
from cur_modifier.vllm.cost import cost
from cur_modifier.vllm.forms import served
from cur_modifier.vllm.parts import Schemes, by_skeleton
from cur_modifier.vllm.stages import stacks

CHECKS: dict[str, Callable[[], None]] = {}
WIDTH, HEAD, GROUP = 32, 8, 32
BLOCK = "model.layers.0.block"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
FORMS = ("dense", "cur", "id")


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Add ``function`` to what is run."""
    CHECKS[function.__name__] = function
    return function


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
    ):
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
            else:
                s, t = random(rank, width), random(out - rank, rank)
                order = torch.randperm(out, generator=generator)
                self.tensors |= {"id_s.weight": s, "id_t.weight": t, "order": order.int()}
                self.product = torch.cat([s, t @ s])[order]
        if self.bias is not None:
            self.tensors["cur_c.bias" if form == "cur" else "bias"] = self.bias

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
            "targets": [f"re:.*{name}.id_[st]$" for name, s in schemes.items() if s == scheme],
            "weights": weights if eight else weights | {"group_size": GROUP},
            "input_activations": activations if eight else None,
            "format": "int-quantized" if eight else "pack-quantized",
        }
    return {"config_groups": groups, "format": "pack-quantized", "ignore": []}


@contextmanager
def built(
    kind: type,
    name: str,
    examples: dict[str, Example],
    *sizes: Any,
    section: dict[str, Any] | None = None,
    keep_factors: bool = True,
    **kwargs: Any,
) -> Iterator[Any]:
    """A vLLM Linear with the examples as parts, not loaded yet. At their size it would be served
    dense by default."""
    modules = {f"{BLOCK}.{n}": e.spec for n, e in examples.items() if e.spec is not None}
    config = CURQuantizationConfig(Schema(modules=modules, compressed_tensors=section))
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


def raises(message: str, function: Callable[[], Any], kind: type[Exception] = SchemaError) -> None:
    """``function`` raises an error of that kind that says ``message``."""
    try:
        function()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no error; expected one that says {message!r}")


def compare(layer: Any, examples: dict[str, Example], width: int = WIDTH) -> None:
    """The layer gives the products side by side."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(9))
    wanted = torch.cat([example(x) for example in examples.values()], -1)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


@check
def registered_once_however_often() -> None:
    register()
    register()
    assert get_quantization_config("cur") is CURQuantizationConfig
    assert QUANTIZATION_METHODS.count("cur") == 1


@check
def every_mix_of_query_key_value() -> None:
    for bias in (False, True):
        for forms in itertools.product(FORMS, repeat=3):
            outs = (4 * HEAD, 2 * HEAD, 2 * HEAD)
            examples = {
                name: Example(form, out, seed, bias=bias)
                for seed, (name, form, out) in enumerate(
                    zip(FUSED["qkv_proj"], forms, outs, strict=True)
                )
            }
            sizes = (WIDTH, HEAD, 4, 2)
            with built(QKVParallelLinear, "qkv_proj", examples, *sizes) as layer:
                if forms == ("dense",) * 3:
                    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
                    continue
                load(layer, examples)
                compare(layer, examples)


@check
def every_mix_of_gate_and_up() -> None:
    for forms in itertools.product(FORMS, repeat=2):
        examples = {
            name: Example(form, 24, seed, bias=True)
            for seed, (name, form) in enumerate(zip(FUSED["gate_up_proj"], forms, strict=True))
        }
        with built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24]) as layer:
            if forms != ("dense", "dense"):
                load(layer, examples)
                compare(layer, examples)


@check
def modules_on_their_own() -> None:
    for kind in (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear):
        for form in ("cur", "id"):
            examples = {"o_proj": Example(form, 40, 2, bias=True)}
            with built(kind, "o_proj", examples, WIDTH, 40) as layer:
                load(layer, examples)
                compare(layer, examples)


@check
def fused_in_the_checkpoint() -> None:
    for form in ("cur", "id"):
        for name, kind, sizes in (
            ("qkv_proj", QKVParallelLinear, (WIDTH, HEAD, 4, 2)),
            ("gate_up_proj", MergedColumnParallelLinear, (WIDTH, [32, 32])),
        ):
            examples = {name: Example(form, 64, 1, bias=True)}
            with built(kind, name, examples, *sizes) as layer:
                load(layer, examples)
                compare(layer, examples)


def one_of_each_form() -> dict[str, Example]:
    """q, k and v as a row ID, CUR and a dense weight."""
    return {
        "q_proj": Example("id", 32, 0),
        "k_proj": Example("cur", 16, 1),
        "v_proj": Example("dense", 16, 2),
    }


def weights_below(layer: Any) -> tuple[int, int]:
    """Numbers that their weights hold, and how many they are."""
    found = [module for module in layer.products.modules() if isinstance(module, LinearBase)]
    return sum(module.weight.numel() for module in found), len(found)


@check
def compiled_without_a_graph_break() -> None:
    examples = one_of_each_form()
    with built(QKVParallelLinear, "qkv_proj", examples, WIDTH, HEAD, 4, 2) as layer:
        load(layer, examples)
        x = torch.randn(5, WIDTH)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


def linears_below(layer: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the Linears that a factored one is made of."""
    return {
        path: (module.input_size, module.output_size)
        for path, module in layer.named_modules()
        if path and isinstance(module, LinearBase)
    }


def as_factors(layer: Any, inputs: int, itemsize: int) -> tuple[int, int]:
    """What the cost model says of the layer, from its parts' shapes."""
    schemes = Schemes(None, layer)
    factors = [served(together, schemes) for together in by_skeleton(layer.quant_method.parts)]
    found = cost(stacks(factors, schemes), inputs, itemsize)
    return found.numbers, found.products


@check
def all_first_stages_are_one_product() -> None:
    examples = one_of_each_form()
    with built(QKVParallelLinear, "qkv_proj", examples, WIDTH, HEAD, 4, 2) as layer:
        load(layer, examples)
        [stage] = layer.products
        assert (stage.first.input_size, stage.first.output_size) == (WIDTH, 3 + 4 + 16)
        compare(layer, examples)


@check
def cur_is_served_in_its_compact_form() -> None:
    """Two products, of r (m + n - r) numbers."""
    example = Example("cur", 24, 1)
    with built(RowParallelLinear, "o_proj", {"o_proj": example}, WIDTH, 24) as layer:
        weights = dict(layer.named_parameters())
        for key, tensor in example.tensors.items():
            weights[key].weight_loader(weights[key], tensor)
        layer.quant_method.process_weights_after_loading(layer)
        kept = sum(parameter.numel() for parameter in layer.parameters())
        assert kept == 4 * (24 + WIDTH - 4), kept


@check
def small_second_stages_are_one_block_matrix() -> None:
    examples = {name: Example("id", 24, seed) for seed, name in enumerate(("gate_proj", "up_proj"))}
    with built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24]) as layer:
        load(layer, examples)
        assert len(layer.products[0].second) == 1
        compare(layer, examples)


@check
def cur_whose_columns_have_no_safe_rows_is_served_all_the_same() -> None:
    rank = 8
    example = Example("cur", 24, 0, rank=rank)
    # Elimination with partial pivoting at its worst: T would hold entries of 2^7.
    columns = torch.eye(rank) - torch.ones(rank, rank).tril(-1)
    columns = torch.cat([columns, torch.ones(16, rank)])
    example.tensors["cur_c.weight"] = columns
    example.product = columns @ example.tensors["cur_u.weight"] @ example.tensors["cur_r.weight"]
    with built(RowParallelLinear, "o_proj", {"o_proj": example}, WIDTH, 24) as layer:
        load(layer, {"o_proj": example})
        compare(layer, {"o_proj": example})
        assert layer.products[0].entries == rank + 24


@check
def outputs_that_stay_in_pairs_are_moved_in_pairs() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        examples = {name: Example("id", 24, 1, rank=6) for name in ("gate_proj", "up_proj")}
        for seed, example in enumerate(examples.values()):
            pairs = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
            order = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
            s, t = example.tensors["id_s.weight"], example.tensors["id_t.weight"]
            example.tensors["order"] = order.int()
            example.product = torch.cat([s, t @ s])[order]
        layers = built(
            MergedColumnParallelLinear,
            "gate_up_proj",
            examples,
            WIDTH,
            [24, 24],
            params_dtype=dtype,
        )
        with layers as layer:
            load(layer, examples)
            assert len(layer.output_pairs) == 24
            x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
            wanted = torch.cat([example(x) for example in examples.values()], -1)
            got = layer(x.to(dtype)).float()
            assert (got - wanted).norm() < 0.02 * wanted.norm()
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x.to(dtype)).float(), got)


@check
def neurons_in_order_need_no_gather() -> None:
    """Gate and up as the stage leaves them: of two ranks, both in the order of their products."""
    examples = {
        name: Example("id", 40, seed, rank=rank)
        for seed, (name, rank) in enumerate({"gate_proj": 12, "up_proj": 8}.items())
    }
    for example in examples.values():
        s, t = example.tensors["id_s.weight"], example.tensors["id_t.weight"]
        example.tensors["order"] = torch.arange(40).int()
        example.product = torch.cat([s, t @ s])
    layers = built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [40, 40])
    with layers as layer:
        load(layer, examples)
        compare(layer, examples)
        assert layer.output_order is None and layer.output_pairs is None
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


QKV = {"q_proj": 4 * HEAD, "k_proj": 2 * HEAD, "v_proj": 2 * HEAD}
QKV_SIZES = (WIDTH, HEAD, 4, 2)
GROUPS = [("q_proj", "k_proj", "v_proj"), *itertools.combinations(QKV, 2)]


def grouped(
    group: tuple[str, ...], leader: str, form: str, *, bias: bool = False, rank: int = 20
) -> dict[str, Example]:
    """q, k and v: those of the group share a skeleton, which the leader has; another form else."""
    shared = sharing({name: QKV[name] for name in group}, leader, rank, bias=bias)
    others = {n: Example(form, QKV[n], seed, bias=bias) for seed, n in enumerate(QKV)}
    return {name: shared.get(name, others[name]) for name in QKV}


@check
def every_way_to_share_a_skeleton_in_query_key_value() -> None:
    for group in GROUPS:
        for leader, form in itertools.product(group, FORMS):
            examples = grouped(group, leader, form, bias=True)
            with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
                load(layer, examples)
                compare(layer, examples)
                assert sum(len(stage.served) for stage in layer.products) == 4 - len(group)


@check
def one_first_and_one_second_stage() -> None:
    for examples, kind, name, sizes in (
        (grouped(GROUPS[0], "k_proj", "dense"), QKVParallelLinear, "qkv_proj", QKV_SIZES),
        (
            sharing({"gate_proj": 24, "up_proj": 24}, "gate_proj", 20),
            MergedColumnParallelLinear,
            "gate_up_proj",
            (WIDTH, [24, 24]),
        ),
    ):
        with built(kind, name, examples, *sizes) as layer:
            load(layer, examples)
            compare(layer, examples)
            total = sum(len(example.product) for example in examples.values())
            assert linears_below(layer) == {
                "products.0.first": (WIDTH, 20),
                "products.0.second.0.0": (20, total - 20),
            }


@check
def a_skeleton_may_be_one_modules_outputs() -> None:
    outs = {"gate_proj": 24, "up_proj": 24}
    for leader in outs:
        for gate in (0, 24):  # all of the skeleton is of one module, which may have no T
            direct = {"gate_proj": gate, "up_proj": 24 - gate}
            examples = sharing(outs, leader, 24, direct=direct)
            layers = built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24])
            with layers as layer:
                load(layer, examples)
                compare(layer, examples)


def outputs_of(examples: dict[str, Example], x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What one of several ranks computes of q, k and v, with two heads of key and value."""
    mine = []
    for name, example in examples.items():
        pieces = size if name == "q_proj" else min(size, 2)
        mine.append(example(x).chunk(pieces, -1)[rank * pieces // size])
    return torch.cat(mine, -1)


@check
def every_rank_of_a_shared_skeleton() -> None:
    for size in (2, 4):  # heads of key and value are split over 2 ranks and repeated on 4
        for group, rank in itertools.product(GROUPS, range(size)):
            examples = grouped(group, group[-1], "id", rank=12 + size)
            with pretend(rank, size):
                with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
                    load(layer, examples)
                x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
                wanted = outputs_of(examples, x, rank, size)
                torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


@check
def a_shared_skeleton_compiles_without_a_graph_break() -> None:
    examples = grouped(("k_proj", "v_proj"), "k_proj", "cur")
    with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
        load(layer, examples)
        x = torch.randn(5, WIDTH)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


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


@check
def quantized_second_stages_are_stacked() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    direct = {"q_proj": 7, "k_proj": 14, "v_proj": 11}  # no kernel takes 57, 18 or 21 outputs
    for scheme in ("W4A16", "W8A8"):
        for leader in QKV:
            got, wanted, layer = quantized(dict.fromkeys(QKV, scheme), direct, x, leader=leader)
            [[stage]] = layer.products[0].second
            assert stage.output_size == 96
            assert not isinstance(stage.quant_method, UnquantizedLinearMethod)
            error = (got - wanted).norm() / wanted.norm()
            assert error < (0.01 if scheme == "W4A16" else 0.03), (scheme, leader, error)


@check
def quantized_first_stages_are_stacked() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    outs = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    for scheme in ("W4A16", "W8A8", "W4A16_ASYM"):
        examples = {n: Example("id", m, 0, width=64, rank=32) for n, m in outs.items()}
        for example in examples.values():
            s, t = example.quantize("id_s", scheme), example.quantize("id_t", scheme)
            example.product = torch.cat([s, t @ s])[example.tensors["order"].long()]
        section = compressed_tensors(dict.fromkeys(outs, scheme))
        layers = built(
            QKVParallelLinear,
            "qkv_proj",
            examples,
            *(64, 32, 4, 2),
            section=section,
            params_dtype=torch.bfloat16,
        )
        with layers as layer:
            load(layer, examples)
            assert len(layer.products) == 1
            assert not isinstance(layer.products[0].first.quant_method, UnquantizedLinearMethod)
            wanted = torch.cat([example(x) for example in examples.values()], -1)
            error = (layer(x.bfloat16()).float() - wanted).norm() / wanted.norm()
            assert error < (0.03 if scheme == "W8A8" else 0.01), (scheme, error)


@check
def quantized_second_stages_of_every_rank() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    for scheme, rank in itertools.product(("W4A16", "W8A8"), range(2)):
        # 32, 6 and 16 rows at most, which no kernel takes; so 64, as for a row ID of all three.
        direct = {"q_proj": 0, "k_proj": 26, "v_proj": 6}
        got, wanted, layer = quantized(dict.fromkeys(QKV, scheme), direct, x, rank=rank, size=2)
        assert layer.products[0].second[0][0].output_size == 64
        error = (got - wanted).norm() / wanted.norm()
        assert error < (0.01 if scheme == "W4A16" else 0.03), (scheme, rank, error)


@check
def second_stages_that_are_quantized_differently() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    direct = {"q_proj": 32, "k_proj": 0, "v_proj": 0}
    for schemes, stages in (
        ({"q_proj": "W4A16", "k_proj": "W4A16"}, [64, 32]),
        ({"q_proj": "W8A8", "v_proj": "W4A16"}, [32, 32, 32]),
        ({"k_proj": "W8A8"}, [64, 32]),
    ):
        got, wanted, layer = quantized(schemes, direct, x)
        assert [chain[0].output_size for chain in layer.products[0].second] == stages
        error = (got - wanted).norm() / wanted.norm()
        assert error < 0.03, (schemes, error)


@check
def unpacked_weights_stand_in_for_kernels() -> None:
    """On every CPU, not only where vLLM's own cannot run."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    direct = {"q_proj": 8, "k_proj": 16, "v_proj": 8}
    theirs = {
        "W4A16": CPUWNA16LinearKernel,
        "W4A16_ASYM": CPUWNA16LinearKernel,
        "W8A8": CPUInt8ScaledMMLinearKernel,
    }
    for scheme, kernel in theirs.items():
        with mock.patch.dict(os.environ, {"VLLM_DISABLED_KERNELS": "Another"}):
            kernels.disable([kernel.__name__])
            kernels.disable([kernel.__name__])
            assert os.environ["VLLM_DISABLED_KERNELS"] == f"Another,{kernel.__name__}"
            got, wanted, layer = quantized(dict.fromkeys(QKV, scheme), direct, x)
        chosen = layer.products[0].first.scheme.kernel
        assert isinstance(chosen, kernels.UnpackedInt8Kernel | kernels.UnpackedWNA16Kernel)
        error = (got - wanted).norm() / wanted.norm()
        assert error < (0.03 if scheme == "W8A8" else 0.01), (scheme, error)


@check
def inputs_with_a_zero_point() -> None:
    """8-bit inputs by every way that compressed-tensors has to round them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(5, 64, generator=generator) + 1
    integers = torch.randint(-127, 128, (32, 64), generator=generator, dtype=torch.int8)
    scale = torch.rand(32, 1, generator=generator) / 100
    for static, symmetric in itertools.product((False, True), repeat=2):
        layer = torch.nn.Module()
        layer.params_dtype = torch.float32
        layer.weight = torch.nn.Parameter(integers, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        layer.input_scale = torch.tensor([2 / 127 if symmetric else 2 / 255]) if static else None
        asymmetric = static and not symmetric
        layer.input_zero_point = torch.tensor([-128], dtype=torch.int8) if asymmetric else None
        kernel = kernels.UnpackedInt8Kernel(
            Int8ScaledMMLinearLayerConfig(static, True, symmetric),
            ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"],
        )
        kernel.process_weights_after_loading(layer)
        wanted = x @ (integers * scale).T
        error = (kernel.apply_weights(layer, x) - wanted).norm() / wanted.norm()
        assert error < 0.01, (static, symmetric, error)


@check
def zero_points_are_stacked_or_refused() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9)).bfloat16().float()
    schemes = dict.fromkeys(QKV, "W4A16_ASYM")
    got, wanted, _ = quantized(schemes, {"q_proj": 8, "k_proj": 16, "v_proj": 8}, x)
    assert (got - wanted).norm() / wanted.norm() < 0.01
    raises(
        "q_proj.id_t has 57 rows, whose zero points are packed by 8: they can't be stacked",
        lambda: quantized(schemes, {"q_proj": 7, "k_proj": 14, "v_proj": 11}, x),
    )


@check
def what_a_shared_skeleton_lacks_is_named() -> None:
    examples = grouped(("k_proj", "v_proj"), "v_proj", "dense")
    for name in ("k_proj", "v_proj"):
        for key, tensor in list(examples[name].tensors.items()):
            with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
                raises(
                    f"{BLOCK}.{name}.{key} is missing from the checkpoint",
                    lambda layer=layer, skip=f"{name}.{key}": load(layer, examples, skip=skip),
                )
            if key.endswith("weight"):
                for changed in (tensor[1:], torch.cat([tensor, tensor[:1]]), tensor[:, 1:]):
                    examples[name].tensors[key] = changed
                    with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
                        message = f"{BLOCK}.{name}.{key} has shape"
                        raises(message, lambda layer=layer: load(layer, examples))
                examples[name].tensors[key] = tensor


@check
def orders_that_lead_nowhere_are_named() -> None:
    examples = grouped(("k_proj", "v_proj"), "v_proj", "dense")
    order = examples["k_proj"].tensors["order"]
    for entry in (-1, int(order[0]), 20 + len(order)):
        examples["k_proj"].tensors["order"] = torch.cat([order[:-1], torch.tensor([entry]).int()])
        with built(QKVParallelLinear, "qkv_proj", examples, *QKV_SIZES) as layer:
            raises(
                f"{BLOCK}.k_proj.order is not each of the",
                lambda layer=layer: load(layer, examples),
            )


@check
def a_skeleton_of_another_linear_is_refused() -> None:
    examples = sharing({"q_proj": 32, "o_proj": 32}, "q_proj", 20)
    modules = {f"{BLOCK}.{name}": example.spec for name, example in examples.items()}
    config = CURQuantizationConfig(Schema(modules=modules))
    config.packed_modules_mapping = FUSED
    raises(
        f"{BLOCK}.o_proj uses the skeleton of {BLOCK}.q_proj, which vLLM does not run in the same",
        lambda: RowParallelLinear(
            WIDTH, 32, bias=False, quant_config=config, prefix=f"{BLOCK}.o_proj"
        ),
    )


@check
def leaders_have_the_names_that_vllm_gives() -> None:
    examples = sharing({"gate_proj": 24, "up_proj": 24}, "up_proj", 20)
    modules = {f"{BLOCK}.{name}": example.spec for name, example in examples.items()}
    config = CURQuantizationConfig(Schema(modules=modules))
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    with mock.patch.object(CURQuantizationConfig, "_check_tensor_parallel"):
        config.apply_vllm_mapper(mapper)
    block = f"language_model.{BLOCK}"
    assert config.modules[f"{block}.gate_proj"].shared_skeleton == f"{block}.up_proj"
    assert config.modules[f"{block}.up_proj"].shared_skeleton is None


@check
def nothing_of_loading_is_left() -> None:
    examples = {"gate_proj": Example("cur", 24, 0), "up_proj": Example("id", 24, 1)}
    with built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24]) as layer:
        load(layer, examples)
        outside = [name for name, _ in layer.named_parameters() if not name.startswith("products.")]
        assert outside == [], outside


@check
def missing_tensors_are_named() -> None:
    examples = {"gate_proj": Example("cur", 24, 0), "up_proj": Example("id", 24, 1, bias=False)}
    keys = [f"{name}.{key}" for name, e in examples.items() for key in e.tensors]
    for skip in keys:
        with built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24]) as layer:
            raises(
                f"{BLOCK}.{skip} is missing from the checkpoint",
                lambda layer=layer, skip=skip: load(layer, examples, skip=skip),
            )


@check
def wrong_shapes_are_named() -> None:
    examples = {"gate_proj": Example("cur", 24, 0), "up_proj": Example("id", 24, 1)}
    for name, example in examples.items():
        for key, tensor in list(example.tensors.items()):
            if not key.endswith("weight"):
                continue
            example.tensors[key] = tensor[1:]
            with built(
                MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24]
            ) as layer:
                raises(f"{BLOCK}.{name}.{key} has shape", lambda layer=layer: load(layer, examples))
            example.tensors[key] = tensor


@check
def wrong_sizes_in_config_are_named() -> None:
    examples = {"o_proj": Example("cur", 40, 2)}

    def build() -> None:
        with built(RowParallelLinear, "o_proj", examples, WIDTH, 48):
            pass

    raises(f"{BLOCK}.o_proj is 40x32, but the model that it describes builds it as 48x32", build)


@check
def a_tensor_of_a_dense_part_is_refused() -> None:
    examples = {"gate_proj": Example("cur", 24, 0), "up_proj": Example("dense", 24, 1)}
    with built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24]) as layer:
        slot = dict(layer.named_parameters())["cur_c.weight"]
        raises("for shard 1", lambda: slot.weight_loader(slot, torch.zeros(24, 3), 1))


@check
def factors_that_save_too_little_are_multiplied_out() -> None:
    shared = sharing({"q_proj": 32, "k_proj": 16, "v_proj": 16}, "k_proj", 12, bias=True)
    for examples, rank in itertools.product((one_of_each_form(), shared), range(2)):
        layers = built(
            QKVParallelLinear, "qkv_proj", examples, WIDTH, HEAD, 4, 2, keep_factors=False
        )
        with pretend(rank, 2), layers as layer:
            load(layer, examples)
        assert not linears_below(layer)
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
        wanted = outputs_of(examples, x, rank, 2)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    for form, rank in itertools.product(("cur", "id"), range(2)):
        examples = {"o_proj": Example(form, 40, 2)}
        layers = built(
            RowParallelLinear,
            "o_proj",
            examples,
            *(WIDTH, 40),
            keep_factors=False,
            reduce_results=False,
        )
        with pretend(rank, 2), layers as layer:
            load(layer, examples)
        half = torch.zeros(5, WIDTH)
        mine = slice(rank * WIDTH // 2, (rank + 1) * WIDTH // 2)
        half[:, mine] = torch.randn(5, WIDTH // 2, generator=torch.Generator().manual_seed(9))
        got = layer(half[:, mine])
        torch.testing.assert_close(got, examples["o_proj"](half), rtol=1e-4, atol=1e-4)


@check
def factors_that_save_more_than_a_product_costs_are_kept() -> None:
    width = 1024
    for form, rank in (("id", 256), ("cur", 256), ("id", 900)):
        examples = {"o_proj": Example(form, width, 2, width=width, rank=rank)}
        layers = built(ReplicatedLinear, "o_proj", examples, width, width, keep_factors=False)
        with layers as layer:
            load(layer, examples)
        assert bool(linears_below(layer)) == (rank == 256), (form, rank)


@check
def what_factors_would_read_is_known_from_their_shapes() -> None:
    heads = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    ids = {name: Example("id", out, seed) for seed, (name, out) in enumerate(heads.items())}
    for examples, rank in itertools.product(
        (one_of_each_form(), ids, sharing(heads, "k_proj", 12)), range(2)
    ):
        layers = built(QKVParallelLinear, "qkv_proj", examples, WIDTH, HEAD, 4, 2)
        with pretend(rank, 2), layers as layer:
            hand_over(layer, examples)
            layer.quant_method.process_weights_after_loading(layer)  # and not the Linears below
            assert weights_below(layer) == as_factors(layer, WIDTH, 4)
    width = 640  # at which the zeros of a block matrix are not cheap
    wide = {
        name: Example("id", width, 0, width=width, rank=320) for name in ("gate_proj", "up_proj")
    }
    with built(MergedColumnParallelLinear, "gate_up_proj", wide, width, [width, width]) as layer:
        hand_over(layer, wide)
        layer.quant_method.process_weights_after_loading(layer)
        assert weights_below(layer) == as_factors(layer, width, 4)
        assert len(linears_below(layer)) == 3


@check
def what_is_multiplied_out_is_rounded_once() -> None:
    for form in ("cur", "id"):
        example = Example(form, 96, 2, width=64, rank=24)
        factors = {k: t.bfloat16() for k, t in example.tensors.items() if k.endswith("weight")}
        example.tensors |= factors
        if form == "cur":
            exact = torch.linalg.multi_dot(
                [factors[f"cur_{name}.weight"].float() for name in "cur"]
            )
        else:
            s, t = (factors[f"id_{name}.weight"].float() for name in "st")
            exact = torch.cat([s, t @ s])[example.tensors["order"]]
        layers = built(
            ReplicatedLinear,
            "o_proj",
            {"o_proj": example},
            *(64, 96),
            keep_factors=False,
            params_dtype=torch.bfloat16,
        )
        with layers as layer:
            load(layer, {"o_proj": example})
        assert not linears_below(layer)
        served = layer(torch.eye(64).bfloat16()).float().T
        error = (served - exact).norm() / exact.norm()
        # A number alone is rounded by up to 0.0039, by 0.0017 at large.
        assert error < 0.002, (form, error)


@check
def orders_are_on_the_cpu_wherever_the_model_is_made() -> None:
    examples = {"gate_proj": Example("cur", 24, 0), "up_proj": Example("dense", 24, 1)}
    layers = built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24])
    with torch.device("meta"), layers as layer:
        for stage in layer.products:
            for _, order in stage.output_orders(0):
                assert order.device.type == "cpu"


@check
def a_layer_whose_model_is_gone_is_freed() -> None:
    for kept in (True, False):
        examples = one_of_each_form()
        layers = built(
            QKVParallelLinear, "qkv_proj", examples, WIDTH, HEAD, 4, 2, keep_factors=kept
        )
        with layers as layer:
            record_metadata_for_reloading(layer)
            load(layer, examples)
        gone = weakref.ref(layer)
        del layer
        gc.collect()
        assert gone() is None, kept


@check
def a_checkpoint_that_was_not_read_is_no_damaged_one() -> None:
    examples = {"o_proj": Example("id", 40, 2)}
    with built(ReplicatedLinear, "o_proj", examples, WIDTH, 40) as layer:
        process = layer.quant_method.process_weights_after_loading
        raises("--load-format dummy", lambda: process(layer))


@check
def a_setting_that_is_neither_true_nor_false_is_refused() -> None:
    schema = Schema(modules={f"{BLOCK}.o_proj": Example("id", 40, 2).spec})
    config = CURQuantizationConfig(schema)
    settings = VllmConfig(additional_config={KEEP_FACTORS: "no"})
    layer = ReplicatedLinear(WIDTH, 40)
    with set_current_vllm_config(settings):
        raises(KEEP_FACTORS, lambda: config.get_quant_method(layer, f"{BLOCK}.o_proj"), ValueError)


@check
def factored_experts_are_refused() -> None:
    schema = Schema(
        modules={
            f"{BLOCK}.experts.0.up_proj": ModuleSpec(
                form="cur", rank=2, in_features=8, out_features=8
            )
        }
    )
    config = CURQuantizationConfig(schema)
    raises(
        "experts.0.up_proj is factored, but vLLM runs it inside",
        lambda: config.get_quant_method(torch.nn.Module(), f"{BLOCK}.experts"),
    )


def main() -> None:
    """Run all checks."""
    torch.set_num_threads(1)
    outcomes: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{folder}/init",
            backend="gloo",
        )
        initialize_model_parallel(1)
        for name, function in CHECKS.items():
            try:
                function()
                outcomes[name] = None
            except Exception:
                outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
