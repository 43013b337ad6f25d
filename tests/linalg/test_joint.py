"""The parts of a joint row ID are the joint row ID."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import RowID, gram_norm, interpolative, split_rows

from .strategies import SEEDS, full_gram, gaussian, seeded

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


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
