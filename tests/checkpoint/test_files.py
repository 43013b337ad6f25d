"""Files that are whole or not there, and fingerprints of what is in them."""

from __future__ import annotations

from collections import Counter

import torch

from cur_modifier.checkpoint.files import digest


def test_digest_tells_values_shapes_and_dtypes_apart() -> None:
    x = torch.arange(6.0)
    others = [x + 1, x.view(2, 3), x.double(), x.bfloat16(), torch.empty(0)]
    assert digest([x]) == digest([x.clone()])
    assert len(Counter([digest([x]), *(digest([o]) for o in others)])) == 6
