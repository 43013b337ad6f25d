"""What published methods look at, against plain computations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlflow_projects.reproduce.masks import Settled, masks_of
from mlflow_projects.reproduce.sublayers import (
    densest,
    outputs_of,
    reading,
    sublayers,
)


def task_loss(outputs: Any, batch: Any, number: int) -> torch.Tensor:
    return outputs.loss * len(batch["input_ids"])


def test_sublayers_come_in_the_order_of_execution(encoder: Any) -> None:
    units, costs = sublayers(encoder, 16)
    assert [each.kind for each in units] == ["heads", "neurons"] * 2
    assert costs.left(units, {u.consumer: u.count for u in units}) == costs.total


def test_masks_have_the_gradients_of_single_samples(encoder: Any, batches: Any) -> None:
    units, _ = sublayers(encoder, 16)
    found = masks_of(encoder, units, batches, task_loss, Settled(encoder, batches))
    each, number, sample = units[0], 1, 2
    single = {key: value[sample : sample + 1] for key, value in batches[number].items()}
    consumer = encoder.get_submodule(each.consumer)
    gradient = []
    for unit in range(each.count):  # by differences
        losses = []
        for step in (1e-2, -1e-2):

            def masked(_: Any, args: Any, step: float = step, unit: int = unit) -> Any:
                h = args[0].clone()
                h[..., each.reads[unit]] *= 1 + step
                return (h,)

            handle = consumer.register_forward_pre_hook(masked)
            with torch.no_grad():
                losses.append(float(encoder(**single).loss))
            handle.remove()
        gradient.append((losses[0] - losses[1]) / 2e-2)
    row = found.gradients[each.consumer][6 * number + sample]
    torch.testing.assert_close(row, torch.tensor(gradient).double(), rtol=2e-2, atol=1e-4)


def test_blocks_are_second_moments_of_real_tokens(encoder: Any, batches: Any) -> None:
    units, _ = sublayers(encoder, 16)
    settled = Settled(encoder, batches)
    found = masks_of(encoder, units, batches, task_loss, settled)
    for each in units:
        h, _ = reading(encoder, each, batches, settled)
        assert len(h) == sum(int(batch["attention_mask"].sum()) for batch in batches)
        gram = (h.mT @ h / len(h)).double()
        blocks = gram[each.reads[:, :, None], each.reads[:, None, :]]
        torch.testing.assert_close(found.blocks[each.consumer], blocks, rtol=1e-4, atol=1e-6)


def test_outputs_are_what_norms_read(encoder: Any, batches: Any) -> None:
    units, _ = sublayers(encoder, 16)
    found = outputs_of(encoder, units, batches)
    settled = Settled(encoder, batches)
    for each in units:
        h, residual = reading(encoder, each, batches, settled)
        consumer = encoder.get_submodule(each.consumer)
        wanted = consumer(h) + residual
        torch.testing.assert_close(found[each.consumer], wanted, rtol=1e-4, atol=1e-5)


def test_norms_in_front_are_refused(small_llama: Any, batches: Any) -> None:
    model = small_llama(0, num_hidden_layers=2)
    units, _ = sublayers(model, 16)
    with pytest.raises(ValueError, match="no module reads its output with the residual added"):
        outputs_of(model, units, batches)


def test_settled_layers_give_what_they_gave(encoder: Any, batches: Any) -> None:
    units, _ = sublayers(encoder, 16)
    settled = Settled(encoder, batches)
    before = reading(encoder, units[2], batches, settled)
    settled.settle(units[0].layer)
    with torch.no_grad():  # nobody looks at it any more
        encoder.get_submodule(units[0].consumer).weight.zero_()
    after = reading(encoder, units[2], batches, settled)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_the_densest_units_stay() -> None:
    scores = [torch.tensor([8.0, 1.0, 6.0]), torch.tensor([0.1, 0.9, 2.0, 1.9])]
    kept = densest(scores, [4, 1], 10)
    # One each (4 + 1), then by score for cost: 1.9, then 6 ÷ 4; 0.9 is too much
    assert [k.tolist() for k in kept] == [[0, 2], [2, 3]]
    assert [len(k) for k in densest(scores, [4, 1], 5)] == [1, 1]
    with pytest.raises(ValueError, match=r"2 sub-layers costs 5, more than the 4"):
        densest(scores, [4, 1], 4)
