"""Calibration batches: which tokens are real, and windows in a fixed order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("llmcompressor")

from cur_modifier.passes.samples import (
    collect_samples,
    first_batches,
    last_real_token,
    main_input,
    real_rows,
    real_tokens,
    stacked,
    with_constant,
)


def test_last_real_token_on_either_side_of_the_padding() -> None:
    ids = torch.zeros(3, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert last_real_token({"input_ids": ids, "attention_mask": mask}).tolist() == [1, 3, 3]
    assert last_real_token({"input_ids": ids}).tolist() == [3, 3, 3]


def batch(ids: torch.Tensor, **fields: Any) -> dict[str, Any]:
    return {"input_ids": ids, **fields}


@given(rows=st.integers(1, 8), batch_size=st.integers(1, 4), seed=st.integers(0, 99))
def test_samples_come_in_one_order_however_they_are_batched(
    rows: int, batch_size: int, seed: int
) -> None:
    ids = torch.randint(0, 50, (rows, 5), generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + 1))
    plain = collect_samples([batch(ids)])
    shuffled = collect_samples([batch(part) for part in ids[order].split(batch_size)])
    assert len(plain) == rows
    for one, other in zip(plain, shuffled, strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert one.tokens == 5 and bool(one.real.all())


def test_a_sample_holds_what_the_model_takes_and_which_tokens_are_real() -> None:
    ids = torch.arange(6).view(2, 3)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    given = batch(ids, attention_mask=mask, labels=ids, loss_mask=mask, use_cache=False)
    [sample] = collect_samples([given])  # a row of nothing but padding is none
    assert sample.inputs.keys() == {"input_ids", "attention_mask"}
    assert sample.inputs["input_ids"].tolist() == [[0, 1, 2]]
    assert sample.real.tolist() == [True, True, False]
    ids.zero_()
    assert sample.inputs["input_ids"].tolist() == [[0, 1, 2]]


@given(st.lists(st.integers(1, 4), max_size=6), st.integers(0, 12))
def test_the_first_batches_hold_the_samples_and_no_more(sizes: list[int], wanted: int) -> None:
    batches = [batch(torch.zeros(size, 2)) for size in sizes]
    chosen = first_batches(batches, wanted)
    assert all(a is b for a, b in zip(chosen, batches, strict=False))
    held = sum(sizes[: len(chosen)])
    assert held >= min(wanted, sum(sizes))
    assert not chosen or held - sizes[len(chosen) - 1] < wanted


def test_a_mask_of_another_kind_says_nothing_of_tokens() -> None:
    ids = torch.zeros(2, 3)
    assert real_tokens(batch(ids)) is None
    assert real_tokens(batch(ids, attention_mask=torch.ones(2, 1, 3, 3))) is None
    assert real_tokens(batch(ids, attention_mask=torch.tensor([[1, 0]]))).tolist() == [
        [True, False]
    ]


@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_rows_of_padding_are_left_out(flags: list[bool]) -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    real = torch.tensor(flags).view(2, 3)
    assert torch.equal(real_rows(x, real), x[real])
    assert torch.equal(real_rows(x, None), x.view(6, 4))
    # An expert sees a choice of the tokens, which the mask does not fit.
    assert torch.equal(real_rows(x[0], real), x[0])


@given(st.integers(0, 5), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_constant_is_a_last_feature(rows: int, features: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    wide = with_constant(x)
    assert wide.shape == (rows, features + 1) and wide.dtype == dtype
    assert torch.equal(wide[:, :-1], x) and bool((wide[:, -1] == 1).all())
    assert torch.equal(x, before)


def test_images_are_samples() -> None:
    pixels = torch.randn(3, 3, 4, 4)
    given = {"pixel_values": pixels, "labels": torch.arange(3)}
    samples = collect_samples([given], labels=True)
    assert len(samples) == 3 and all(sample.tokens == 1 for sample in samples)
    for sample in samples:
        [label] = sample.inputs["labels"].tolist()
        assert torch.equal(sample.inputs["pixel_values"], pixels[label : label + 1])
    assert collect_samples([given])[0].inputs.keys() == {"pixel_values"}
    assert len(first_batches([given] * 3, 4)) == 2


def test_data_that_hold_neither_tokens_nor_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns \['x'\].*input_ids.*Name the model's input so"):
        main_input({"x": torch.ones(2)})


def test_neighbours_of_one_shape_are_stacked() -> None:
    samples = [
        {"pixel_values": torch.full((1, 1, side, side), float(number))}
        for number, side in enumerate((3, 3, 3, 4, 4))
    ]
    found = [batch["pixel_values"][:, 0, 0, 0].tolist() for batch in stacked(samples, 2)]
    assert found == [[0.0, 1.0], [2.0], [3.0, 4.0]]
