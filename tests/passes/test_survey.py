"""Angular distance, and how large inputs are."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.passes.survey import angular_distance


def test_angles() -> None:
    x = torch.tensor([[1.0, 0.0]])
    assert angular_distance(x, 3 * x) == pytest.approx(0, abs=1e-7)
    assert angular_distance(x, torch.tensor([[0.0, 2.0]])) == pytest.approx(0.5)
    assert angular_distance(x, -x) == pytest.approx(1)
    both = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    assert angular_distance(x.expand(2, 2), both) == pytest.approx(0.25 + 1)
    assert math.isnan(angular_distance(x, x * math.nan))
