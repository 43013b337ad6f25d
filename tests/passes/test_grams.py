"""One sum for modules that read one tensor, and one each for modules that do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llmcompressor")

from cur_modifier.passes.grams import SharedGrams


def batch(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def moment(*batches: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in batches])
    return rows.T @ rows / len(rows)


def test_modules_that_read_one_tensor_have_one_sum() -> None:
    grams = SharedGrams()
    for seed in range(3):
        x, other = batch(seed), batch(seed + 10)
        for module in ("q", "k"):
            grams.update(module, x)
        grams.update("o", other)
        grams.next_batch()
    assert grams["q"] is grams["k"] and grams["o"] is not grams["q"]
    assert grams["q"].tokens == 18
    torch.testing.assert_close(grams["q"].second_moment(), moment(*map(batch, range(3))))
    torch.testing.assert_close(grams["o"].second_moment(), moment(*map(batch, range(10, 13))))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(1, 3))
def test_every_module_s_moment_is_that_of_what_it_reads(places: list[int], passes: int) -> None:
    """Module ``i`` reads tensor ``places[i]`` of every batch, in the order of the tensors."""
    grams = SharedGrams()
    for number in range(passes):
        tensors = [batch(10 * number + place) for place in range(3)]
        for module, place in sorted(enumerate(places), key=lambda pair: pair[1]):
            grams.update(module, tensors[place])
        grams.next_batch()
    for module, place in enumerate(places):
        expected = moment(*(batch(10 * number + place) for number in range(passes)))
        torch.testing.assert_close(grams[module].second_moment(), expected)
    assert len({id(grams[module]) for module in range(len(places))}) == len(set(places))


def test_modules_that_meet_later_keep_their_own() -> None:
    grams, x, y, z = SharedGrams(), batch(0), batch(1), batch(2)
    grams.update("a", x)
    grams.update("b", y)
    grams.next_batch()
    grams.update("a", z)
    grams.update("b", z)
    torch.testing.assert_close(grams["a"].second_moment(), moment(x, z))
    torch.testing.assert_close(grams["b"].second_moment(), moment(y, z))


def test_modules_that_part_share_what_they_read_together() -> None:
    grams, (x, y, z) = SharedGrams(), (batch(seed) for seed in range(3))
    grams.update("a", x)
    grams.update("b", x)
    grams.next_batch()
    grams.update("a", y)
    grams.update("b", z)
    torch.testing.assert_close(grams["a"].second_moment(), moment(x, y))
    torch.testing.assert_close(grams["b"].second_moment(), moment(x, z))
    grams.drop("a")
    assert grams.get("a") is None
    torch.testing.assert_close(grams["b"].second_moment(), moment(x, z))


def test_a_module_that_joins_has_no_part_in_what_was_before() -> None:
    grams, x, y = SharedGrams(), batch(0), batch(1)
    grams.update("a", x)
    grams.next_batch()
    grams.update("a", y)
    grams.update("b", y)
    assert (grams["a"].tokens, grams["b"].tokens) == (12, 6)
    torch.testing.assert_close(grams["b"].second_moment(), moment(y))


def test_what_is_written_in_place_afterwards_counts_as_it_was_read() -> None:
    grams, x = SharedGrams(), batch(0)
    expected = moment(x.clone())
    grams.update("a", x)
    x.mul_(7)
    torch.testing.assert_close(grams["a"].second_moment(), expected)


def test_a_module_that_reads_a_tensor_twice_counts_it_twice() -> None:
    grams, x = SharedGrams(), batch(0)
    grams.update("a", x)
    grams.update("a", x)
    assert grams["a"].tokens == 12


def test_padding_counts_for_nothing() -> None:
    grams, x = SharedGrams(), batch(0)
    real = torch.tensor([[True, True, False], [False, True, True]])
    grams.update("q", x, real)
    assert grams["q"].tokens == 4
    torch.testing.assert_close(grams["q"].second_moment(), moment(x[real]))


def test_a_module_that_no_token_reached_has_none() -> None:
    grams = SharedGrams()
    grams.update("q", batch(0))
    assert grams.get("k") is None
    with pytest.raises(KeyError):
        _ = grams["k"]
    grams.drop("q")
    grams.drop("q")
    assert grams.get("q") is None
