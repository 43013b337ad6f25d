"""What selections on an orthonormal basis share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg.selection.basis import largest, require_basis

from ..strategies import bases


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_the_largest_come_first_and_ties_by_index(values, data):
    count = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert largest(torch.tensor(values), count).tolist() == expected


@given(bases())
def test_a_basis_is_let_through(V):
    require_basis(V)


def test_what_is_no_basis_is_named():
    with pytest.raises(ValueError, match=r"the basis has shape \(2, 3\).*Pass the transpose"):
        require_basis(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"the basis contains NaN or infinity in 1 of 2"):
        require_basis(torch.tensor([[1.0], [torch.nan]]))
