"""Half precision where it is faster, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from cur_modifier.precision import computed_dtype, half_products, has_bfloat16_units

CPU = torch.device("cpu")


def product(dtype: torch.dtype) -> torch.Tensor:
    A = torch.randn(8, 8, dtype=dtype)
    with half_products(dtype, CPU):
        return A @ A


@pytest.mark.parametrize("units", [True, False])
def test_float32_is_halved_where_the_device_has_units(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": units})
    assert has_bfloat16_units(CPU) is units
    assert product(torch.float32).dtype is (torch.bfloat16 if units else torch.float32)


@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_is_computed_wider_where_it_would_be_emulated(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": units})
    assert computed_dtype(torch.bfloat16) is (torch.bfloat16 if units else torch.float32)
    assert computed_dtype(torch.float16) is torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_models_run_in_their_own(dtype: torch.dtype) -> None:
    assert product(dtype).dtype is dtype


def test_a_cpu_that_torch_does_not_describe_counts_as_one_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_bfloat16_units(CPU)
