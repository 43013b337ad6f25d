"""Row IDs: the compact form of a pair, real rows, and the parts of a joint one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    RowID,
    gram_norm,
    interpolative,
    low_rank,
    row_id_of_pair,
    split_rows,
)

from .strategies import (
    DTYPES,
    SEEDS,
    full_gram,
    gaussian,
    grams,
    matrices_and_ranks,
    pick,
    seeded,
)

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@st.composite
def pairs(draw):
    A, rank = draw(matrices_and_ranks(tall=True))
    seed = draw(SEEDS)
    return type(low_rank(A, 1))(
        A=A[:, :rank], B=gaussian(rank, draw(st.integers(1, 12)), seeded(seed))
    )


@given(pairs(), st.sampled_from([1.01, 1.5, 2.0, 10.0]))
def test_compact_is_the_pair_with_bounded_entries(pair, max_entry):
    row_id = row_id_of_pair(pair, max_entry=max_entry)
    m, rank = pair.A.shape
    assert row_id.S.shape == (rank, pair.B.shape[1])
    assert row_id.T.shape == (m - rank, rank)
    assert torch.equal(row_id.order.sort().values, torch.arange(m))
    scale = float(pair.A.norm() * pair.B.norm())
    torch.testing.assert_close(row_id.dense(), pair.dense(), rtol=0, atol=1e-12 * scale)
    assert row_id.T.numel() == 0 or float(row_id.T.abs().max()) <= max_entry * (1 + 1e-9)


@given(pairs())
def test_the_skeleton_is_what_its_rows_give(pair):
    row_id = row_id_of_pair(pair)
    assert row_id.rows.unique().numel() == row_id.rank
    assert torch.equal(row_id.dense()[row_id.rows], row_id.S)
    expected = pair.dense()[row_id.rows]
    torch.testing.assert_close(row_id.S, expected, rtol=1e-10, atol=1e-12 * float(pair.A.norm()))


@given(st.data(), matrices_and_ranks(), DTYPES, SEEDS)
def test_chosen_rows_are_stored_bit_for_bit(data, case, dtype, seed):
    W, rank = case
    gram = data.draw(st.none() | grams(W.shape[1]))
    W = W.to(dtype)
    rows = pick(W.shape[0], rank, seed)
    row_id = interpolative(W, rank, gram, rows=rows)
    assert torch.equal(row_id.S.to(dtype), W[rows])
    assert torch.equal(row_id.rows, rows)
    assert torch.equal(row_id.dense()[rows].to(dtype), W[rows])


def test_bad_rows_are_named():
    W = torch.ones(5, 4)
    with pytest.raises(ValueError, match="2 distinct"):
        interpolative(W, 2, rows=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"rows.*7.*0\.\.4"):
        interpolative(W, 2, rows=torch.tensor([1, 7]))


def test_a_bad_pair_is_named():
    pair = low_rank(torch.ones(5, 4), 2)
    make = type(pair)
    with pytest.raises(ValueError, match=r"left factor.*NaN"):
        row_id_of_pair(make(pair.A * torch.nan, pair.B))
    with pytest.raises(ValueError, match=r"right factor.*NaN"):
        row_id_of_pair(make(pair.A, pair.B * torch.nan))
    with pytest.raises(ValueError, match=r"max_entry is 1.*above 1"):
        row_id_of_pair(pair, max_entry=1)
    with pytest.raises(ValueError, match=r"left factor has shape \(2, 5\).*as many rows"):
        row_id_of_pair(make(pair.A.T, pair.A))


# The parts of a joint row ID are the joint row ID.


def whole_numbers(sizes: list[int], n: int, rank: int, seed: int) -> RowID:
    """A row ID of small integers, whose products no rounding can change."""
    generator = seeded(seed)
    m = sum(sizes)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-9, 10, shape, generator=generator).double()

    order = torch.randperm(m, generator=generator)
    return RowID(S=draw(rank, n), T=draw(m - rank, rank), order=order)


@given(SIZES, st.integers(1, 9), st.integers(1, 36), SEEDS)
def test_the_parts_stacked_are_the_joint_product(sizes, n, rank, seed):
    joint = whole_numbers(sizes, n, min(rank, n, sum(sizes)), seed)
    parts = split_rows(joint, sizes)
    assert [part.shape for part in parts] == [(m, n) for m in sizes]
    assert torch.equal(torch.cat([part.dense() for part in parts]), joint.dense())


@given(SIZES, st.integers(1, 9), st.integers(1, 36), SEEDS)
def test_nothing_is_stored_twice(sizes, n, rank, seed):
    joint = whole_numbers(sizes, n, min(rank, n, sum(sizes)), seed)
    parts = split_rows(joint, sizes)
    assert all(part.S is joint.S for part in parts)
    stored = joint.S.numel() + sum(part.T.numel() for part in parts)
    assert stored == joint.rank * (sum(sizes) + n - joint.rank)
    assert sum(part.direct_outputs for part in parts) == joint.rank


@given(SIZES, st.integers(1, 9), st.integers(1, 36), SEEDS)
def test_direct_outputs_are_rows_of_the_skeleton(sizes, n, rank, seed):
    joint = whole_numbers(sizes, n, min(rank, n, sum(sizes)), seed)
    start, owned = 0, []
    for part in split_rows(joint, sizes):
        skeleton_rows = part.order[part.rows]
        assert part.rows.shape == (part.direct_outputs,)
        assert torch.equal(part.dense()[part.rows], joint.S[skeleton_rows])
        assert torch.equal(skeleton_rows, skeleton_rows.sort().values)
        owned += (part.rows + start).tolist()
        start += part.shape[0]
    assert sorted(owned) == sorted(joint.rows.tolist())


@given(SEEDS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_joint_fit_is_best_for_all_parts_together(seed, dtype):
    """Split or not, the error under the activations is that of the joint form."""
    generator = seeded(seed)
    sizes = [12, 6, 6]
    W = gaussian(sum(sizes), 10, generator).to(dtype)
    gram = full_gram(10, generator)
    joint = interpolative(W, 8, gram)
    parts = split_rows(joint, sizes)
    errors = [
        float(gram_norm(block.to(part.S) - part.dense(), gram)) ** 2
        for block, part in zip(W.split(sizes), parts, strict=True)
    ]
    whole = float(gram_norm(W.to(joint.S) - joint.dense(), gram)) ** 2
    assert sum(errors) == pytest.approx(whole, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("sizes", [[], [4, 3], [9, -1], [8, 0]])
def test_sizes_that_do_not_stack_are_named(sizes):
    joint = whole_numbers([4, 4], 5, 3, 0)
    with pytest.raises(ValueError, match=r"blocks of .* do not stack to the 8 rows"):
        split_rows(joint, sizes)
