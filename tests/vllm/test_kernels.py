import itertools
import os

import pytest
import torch
from linears import QKV, quantized, relative_error, rounded_inputs
from vllm.model_executor.kernels.linear import (
    CPUInt8ScaledMMLinearKernel,
    CPUWNA16LinearKernel,
    Int8ScaledMMLinearLayerConfig,
)

from cur_modifier.vllm import kernels


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("W4A16", CPUWNA16LinearKernel),
        ("W4A16_ASYM", CPUWNA16LinearKernel),
        ("W8A8", CPUInt8ScaledMMLinearKernel),
    ],
)
def test_unpacked_weights_stand_in_for_kernels(
    scheme: str, kernel: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every CPU, not only where vLLM's own cannot run."""
    x = rounded_inputs(64)
    direct = {"q_proj": 8, "k_proj": 16, "v_proj": 8}
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "Another")
    kernels.disable([kernel.__name__])
    kernels.disable([kernel.__name__])
    assert os.environ["VLLM_DISABLED_KERNELS"] == f"Another,{kernel.__name__}"
    got, wanted, layer = quantized(dict.fromkeys(QKV, scheme), direct, x)
    chosen = layer.products[0].first.scheme.kernel
    assert isinstance(chosen, kernels.UnpackedInt8Kernel | kernels.UnpackedWNA16Kernel)
    assert relative_error(got, wanted) < (0.03 if scheme == "W8A8" else 0.01)


@pytest.mark.parametrize(("static", "symmetric"), [*itertools.product((False, True), repeat=2)])
def test_inputs_with_a_zero_point(static: bool, symmetric: bool) -> None:
    """8-bit inputs by every way that compressed-tensors has to round them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(5, 64, generator=generator) + 1
    integers = torch.randint(-127, 128, (32, 64), generator=generator, dtype=torch.int8)
    scale = torch.rand(32, 1, generator=generator) / 100
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
    assert relative_error(kernel.apply_weights(layer, x), wanted) < 0.01
