"""CUR layers know which rows and columns they are made of."""

from __future__ import annotations

import pytest

from cur_modifier.forms.cur import CURLinear


def test_bad_ranks_are_named() -> None:
    with pytest.raises(ValueError, match=r"rank 7 is outside 1..6 for a 8x6"):
        CURLinear(6, 8, 7)
