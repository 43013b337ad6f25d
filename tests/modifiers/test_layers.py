"""Angular distance, and which token it is measured at."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.passes.samples import last_real_token
from cur_modifier.passes.survey import angular_distance


def test_angles() -> None:
    x = torch.tensor([[1.0, 0.0]])
    assert angular_distance(x, 3 * x) == pytest.approx(0, abs=1e-7)
    assert angular_distance(x, torch.tensor([[0.0, 2.0]])) == pytest.approx(0.5)
    assert angular_distance(x, -x) == pytest.approx(1)
    both = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    assert angular_distance(x.expand(2, 2), both) == pytest.approx(0.25 + 1)
    assert math.isnan(angular_distance(x, x * math.nan))


def test_last_real_token_on_either_side_of_the_padding() -> None:
    ids = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert last_real_token({"input_ids": ids, "attention_mask": mask}).tolist() == [1, 3, 3]
    assert last_real_token({"input_ids": ids}).tolist() == [3, 3, 3]
