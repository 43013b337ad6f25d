"""Checks of the serving plugin on single vLLM Linears, in one process of the serving environment.

    .venvs/serve/bin/python integration_tests/plugin_checks.py

prints a JSON object: what went wrong in each check, or null. `test_serve_plugin.py` runs it; pytest
is not in that environment. Checks that need a server are in the other `test_serve_*` files.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
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

from cur_modifier.layout import Layout, LayoutError, ModuleLayout
from cur_modifier.vllm import register
from cur_modifier.vllm.config import CURQuantizationConfig

CHECKS: dict[str, Callable[[], None]] = {}
WIDTH, HEAD = 32, 8
BLOCK = "model.layers.0.block"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
FORMS = ("dense", "cur", "id")


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Add ``function`` to what is run."""
    CHECKS[function.__name__] = function
    return function


class Example:
    """A dense Linear of random weights, as a part of the given form: tensors and exact product."""

    def __init__(self, form: str, out: int, seed: int, *, width: int = WIDTH, bias: bool = False):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        rank = 3 + seed % 4  # parts of one module have ranks of their own
        self.layout: ModuleLayout | None = None
        self.tensors: dict[str, torch.Tensor] = {}
        self.bias = random(out) if bias else None
        if form == "dense":
            self.tensors["weight"] = self.product = random(out, width)
        else:
            self.layout = ModuleLayout(
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


@contextmanager
def built(
    kind: type, name: str, examples: dict[str, Example], *sizes: Any, **kwargs: Any
) -> Iterator[Any]:
    """A vLLM Linear with the examples as parts, not loaded yet."""
    modules = {f"{BLOCK}.{n}": e.layout for n, e in examples.items() if e.layout is not None}
    config = CURQuantizationConfig(Layout(modules=modules))
    config.packed_modules_mapping = FUSED
    bias = any(example.bias is not None for example in examples.values())
    with set_current_vllm_config(VllmConfig()):
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
    ids: list[Any] = [None]
    if len(examples) > 1:
        ids = ["q", "k", "v"] if isinstance(layer, QKVParallelLinear) else [0, 1]
    parameters = dict(layer.named_parameters())
    for shard, (name, example) in zip(ids, examples.items(), strict=True):
        for key, tensor in example.tensors.items():
            if f"{name}.{key}" != skip:
                arguments = () if shard is None else (shard,)
                parameters[key].weight_loader(parameters[key], tensor, *arguments)
    for module in list(layer.modules()):  # parents first, as vLLM goes
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)


def raises(message: str, function: Callable[[], Any]) -> None:
    """``function`` raises a LayoutError that says ``message``."""
    try:
        function()
    except LayoutError as error:
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


@check
def compiled_without_a_graph_break() -> None:
    examples = {
        "q_proj": Example("id", 32, 0),
        "k_proj": Example("cur", 16, 1),
        "v_proj": Example("dense", 16, 2),
    }
    with built(QKVParallelLinear, "qkv_proj", examples, WIDTH, HEAD, 4, 2) as layer:
        load(layer, examples)
        x = torch.randn(5, WIDTH)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


@check
def nothing_of_loading_is_left() -> None:
    examples = {"gate_proj": Example("cur", 24, 0), "up_proj": Example("id", 24, 1)}
    with built(MergedColumnParallelLinear, "gate_up_proj", examples, WIDTH, [24, 24]) as layer:
        load(layer, examples)
        outside = [name for name, _ in layer.named_parameters() if not name.startswith("parts.")]
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
def factored_experts_are_refused() -> None:
    layout = Layout(
        modules={
            f"{BLOCK}.experts.0.up_proj": ModuleLayout(
                form="cur", rank=2, in_features=8, out_features=8
            )
        }
    )
    config = CURQuantizationConfig(layout)
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
