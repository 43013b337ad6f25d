"""Empty factored modules take the places of Linears."""

from __future__ import annotations

import pytest

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.cur.install import quantization_noise


def test_four_bits_bring_about_one_percent_of_noise() -> None:
    assert quantization_noise(None) == 0
    assert quantization_noise(4) == pytest.approx(0.0081, rel=0.01)
    assert quantization_noise(8) == pytest.approx(quantization_noise(4) / 256)
