"""In what precision a model's products are run."""

from __future__ import annotations

import torch

__all__ = ["computed_dtype", "half_products", "has_bfloat16_units"]


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 in hardware.

    A CPU without them emulates bfloat16, at a sixth of the speed of float32 (AVX2, measured); one
    that torch knows nothing of counts as such.
    """
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(bool(has) for name, has in capabilities.items() if "bf16" in name)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 for bfloat16 where the present device emulates it: the accelerator, or
    the CPU where there is none."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    emulated = dtype is torch.bfloat16 and not has_bfloat16_units(device)
    return torch.float32 if emulated else dtype


def half_products(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which a model of ``dtype`` runs its products in half precision.

    Three times as fast as float32 where there are units for bfloat16. Where there are none, and for
    wider models, it changes nothing.
    """
    if dtype is torch.float32:
        return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16_units(device))
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half)
