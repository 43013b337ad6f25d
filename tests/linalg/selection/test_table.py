"""The selections by their names: rows and columns of one matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    Selection,
    cur,
    select_rows,
    select_rows_and_columns,
)

from ..strategies import (
    DTYPES,
    SEEDS,
    assert_selection,
    gaussian,
    matrices_and_ranks,
    seeded,
)


@given(st.sampled_from(Selection), matrices_and_ranks(), DTYPES, SEEDS)
def test_rows_and_columns_are_distinct_in_range_and_repeatable(kind, case, dtype, seed):
    A, rank = case
    A = A.to(dtype)
    before = A.clone()
    rows, columns = select_rows_and_columns(kind, A, rank, seed=seed)
    assert_selection(rows, rank, A.shape[0])
    assert_selection(columns, rank, A.shape[1])
    again = select_rows_and_columns(kind, A, rank, seed=seed)
    assert torch.equal(rows, again[0])
    assert torch.equal(columns, again[1])
    assert torch.equal(rows, select_rows(kind, A, rank, seed=seed))
    assert torch.equal(A, before)


@pytest.mark.parametrize("kind", [Selection.DEIM, Selection.QDEIM])
@given(SEEDS)
def test_deim_never_takes_a_copy_while_something_new_is_left(kind, seed):
    distinct = gaussian(6, 5, seeded(seed))
    A = torch.cat([distinct, distinct])[:, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    rows, columns = select_rows_and_columns(kind, A, 5)
    assert (rows % 6).unique().numel() == 5
    assert (columns % 5).unique().numel() == 5


@pytest.mark.parametrize("kind", Selection)
def test_a_long_matrix_selects_alike_for_a_seed(kind):
    A = gaussian(1500, 1450, seeded(0)).float()  # large enough to be sketched
    first, second = (select_rows_and_columns(kind, A, 20, seed=7) for _ in range(2))
    for indices, again, side in zip(first, second, A.shape, strict=True):
        assert_selection(indices, 20, side)
        assert torch.equal(indices, again)


@pytest.mark.parametrize("kind", [Selection.DEIM, Selection.QDEIM])
def test_a_sketched_selection_finds_the_rank(kind):
    generator = seeded(0)
    A = gaussian(1500, 20, generator) @ gaussian(20, 1450, generator)
    rows, columns = select_rows_and_columns(kind, A, 20)
    torch.testing.assert_close(cur(A, rows, columns).dense(), A)


@pytest.mark.parametrize("kind", Selection)
def test_bad_input_is_named(kind):
    A = torch.ones(4, 3)
    A[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"scored matrix.*NaN.*1 of 12"):
        select_rows_and_columns(kind, A, 2)
    with pytest.raises(ValueError, match=r"scored matrix.*NaN.*1 of 12"):
        select_rows(kind, A, 2)
    with pytest.raises(ValueError, match="scored matrix has shape"):
        select_rows_and_columns(kind, torch.ones(4), 2)
    for rank in (0, 4):
        with pytest.raises(ValueError, match=rf"rank {rank} is outside 1\.\.3 for a 4x3 matrix"):
            select_rows_and_columns(kind, torch.ones(4, 3), rank)
