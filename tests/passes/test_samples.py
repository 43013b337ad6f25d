"""Calibration batches: which tokens are real, and windows in a fixed order."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.passes.samples import last_real_token


def test_last_real_token_on_either_side_of_the_padding() -> None:
    ids = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert last_real_token({"input_ids": ids, "attention_mask": mask}).tolist() == [1, 3, 3]
    assert last_real_token({"input_ids": ids}).tolist() == [3, 3, 3]
