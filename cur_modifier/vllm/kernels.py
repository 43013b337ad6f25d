"""Integer weights on CPUs where vLLM's own kernels for them cannot run, or are wrong.

vLLM chooses its CPU kernels without a look at the CPU. On x86 without AVX-512 its W4A16 kernel has
no operator behind it, and such a server fails at its first token. Without VNNI, products of 8-bit
integers are summed in pairs in 16 bits, which saturate (oneDNN, "Nuances of int8 computations"):
weights above 64 of 127 give answers that are a tenth off. There, weights are unpacked as they are
loaded, and multiplied as those of a dense Linear are.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch import nn
from vllm import _custom_ops as ops  # loads the operators that this CPU has
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import (
    CPUInt8ScaledMMLinearKernel,
    CPUWNA16LinearKernel,
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
    MPLinearKernel,
    MPLinearLayerConfig,
    register_linear_kernel,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils.w8a8_utils import convert_to_channelwise
from vllm.platforms import CpuArchEnum, PlatformEnum, current_platform

__all__ = [
    "UnpackedInt8Kernel",
    "UnpackedWNA16Kernel",
    "as_dense",
    "disable",
    "replace_unfit",
    "unfit",
]

logger = init_logger(f"vllm.{__name__}")  # vLLM shows its own loggers only

_DISABLED = "VLLM_DISABLED_KERNELS"


class UnpackedWNA16Kernel(MPLinearKernel):
    """Products with weights of 2 to 8 bits in compressed-tensors' packed layout, unpacked once to
    the dtype that is served: all of a dense Linear's memory, and its speed."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        packed, scale, zero_point = self._get_weight_params(layer)
        bits = self.config.weight_type.size_bits
        inputs, outputs = self.config.partition_weight_shape
        if zero_point is not None:
            zero_point = unpack_from_int32(
                zero_point.data, bits, torch.Size((outputs, scale.shape[1])), packed_dim=0
            )
        integers = unpack_from_int32(packed.data, bits, torch.Size((outputs, inputs)))
        weight = dequantize(integers, scale.data, zero_point)
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if getattr(layer, name or "", None) is not None:
                delattr(layer, name)
        self._dense = as_dense(layer, weight.to(self.config.act_type))

    def apply_weights(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._dense.apply(layer, x, bias)


class UnpackedInt8Kernel(Int8ScaledMMLinearKernel):
    """Products of 8-bit weights and inputs that are rounded to 8 bits, in the dtype that is served:
    what W8A8 computes but for that dtype's rounding, in a dense Linear's memory."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        integers, scale, _, zero_point, _ = self._get_layer_params(layer)
        if zero_point is not None:
            whole = nn.Parameter(zero_point.data.to(torch.int32), requires_grad=False)
            setattr(layer, self.layer_param_names[3], whole)
        if not self.config.is_channelwise:
            scale = convert_to_channelwise(scale, layer.logical_widths)
        weight = dequantize(integers.data, scale.data)
        self._dense = as_dense(layer, weight.to(layer.params_dtype))

    def apply_weights(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        _, _, scale, zero_point, _ = self._get_layer_params(layer)
        integers, scale, zero_point = ops.onednn_scaled_int8_quant(
            x.contiguous(), scale, zero_point, self.config.input_symmetric
        )
        rounded = integers.float().view(-1, x.shape[-1])
        if zero_point is not None:
            rounded = rounded - zero_point
        return self._dense.apply(layer, (rounded * scale).to(x.dtype).view_as(x), bias)


def as_dense(layer: nn.Module, weight: torch.Tensor) -> UnquantizedLinearMethod:
    """Make ``weight`` the layer's own, and give the method that multiplies by it."""
    layer.weight = nn.Parameter(weight, requires_grad=False)
    method = UnquantizedLinearMethod()
    method.process_weights_after_loading(layer)
    return method


def unfit() -> list[str]:
    """Names of vLLM's kernels for integer weights that it would choose, and this CPU cannot run."""
    if not current_platform.is_cpu():
        return []
    found = []
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        found.append(CPUWNA16LinearKernel.__name__)
    capabilities = torch.cpu.get_capabilities()
    x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    if x86 and not (capabilities.get("avx512_vnni") or capabilities.get("avx_vnni")):
        found.append(CPUInt8ScaledMMLinearKernel.__name__)
    return found


def disable(kernels: list[str]) -> None:
    """Let vLLM choose ours in place of those kernels of its own, in this process.

    May be called again: what is disabled already, by the user or by us, stays so.
    """
    disabled = [name for name in os.environ.get(_DISABLED, "").split(",") if name]
    new = [name for name in kernels if name not in disabled]
    os.environ[_DISABLED] = ",".join([*disabled, *new])
    for ours, kind, theirs in (
        (UnpackedWNA16Kernel, "mp", CPUWNA16LinearKernel),
        (UnpackedInt8Kernel, "int8", CPUInt8ScaledMMLinearKernel),
    ):
        if theirs.__name__ in new:
            register_linear_kernel(ours, PlatformEnum.CPU, kind)


@cache
def replace_unfit() -> None:
    """Replace the kernels that are unfit for this CPU, once a process, and say so in the log."""
    kernels = unfit()
    if kernels:
        logger.warning_once(
            "This CPU lacks the instructions that vLLM's kernels for integer weights need (AVX-512 "
            "for 4 bits, VNNI for 8). Quantized weights are unpacked as they are loaded: the model "
            "takes the memory and the time that it would without quantization."
        )
        disable(kernels)
