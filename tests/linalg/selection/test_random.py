"""Rows at random, repeatably."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    random,
)

from ..strategies import (
    SEEDS,
    assert_selection,
    seeded,
)


@given(st.integers(1, 50), st.data(), SEEDS)
def test_random_is_a_seeded_choice(length, data, seed):
    count = data.draw(st.integers(1, length))
    chosen = random(length, count, seeded(seed))
    assert_selection(chosen, count, length)
    assert torch.equal(chosen, random(length, count, seeded(seed)))


@given(st.integers(1, 30))
def test_counts_out_of_range_are_refused(length):
    for count in (0, length + 1):
        with pytest.raises(ValueError, match=rf"rank {count} is outside 1\.\.{length}"):
            random(length, count, seeded(0))
