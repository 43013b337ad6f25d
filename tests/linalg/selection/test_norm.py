"""Rows by their length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from cur_modifier.linalg import (
    norm,
)

from ..strategies import (
    matrices,
    matrices_and_ranks,
)


@given(matrices_and_ranks())
def test_norm_takes_the_longest_rows(case):
    A, count = case
    lengths = A.norm(dim=1)
    expected = sorted(range(A.shape[0]), key=lambda i: (-float(lengths[i]), i))[:count]
    assert norm(A, count).tolist() == expected


@given(matrices())
def test_counts_out_of_range_are_refused(A):
    length = A.shape[0]
    for count in (0, length + 1):
        with pytest.raises(ValueError, match=rf"rank {count} is outside 1\.\.{length}"):
            norm(A, count)


def test_ties_go_by_index():
    assert norm(torch.ones(4, 2), 3).tolist() == [0, 1, 2]
