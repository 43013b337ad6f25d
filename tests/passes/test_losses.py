"""The loss of every head: its gradient is that of the distribution that the head gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.passes.losses import drawn_loss

DRAWS = 4000


def fisher(outputs: dict[str, torch.Tensor], inputs: Any, problem: str | None = None) -> Any:
    """Mean outer product of the gradients at the first output, over many draws."""
    name, leaf = next(iter(outputs.items()))
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(leaf[0].numel(), leaf[0].numel())
    for _ in range(DRAWS):
        mine = leaf.clone().requires_grad_()
        loss = drawn_loss(SimpleNamespace(**outputs | {name: mine}), inputs, generator, problem)
        [gradient] = torch.autograd.grad(loss, mine)
        row = gradient[0].flatten()
        total += torch.outer(row, row) / DRAWS
    return total


def inputs(tokens: int = 1, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(1, tokens, dtype=torch.long), **more}


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 3)])
def test_classes_have_the_covariance_of_their_indicator(shape: tuple[int, ...]) -> None:
    logits = torch.tensor([0.3, -1.0, 0.8]).view(shape)
    p = logits.flatten().softmax(0)
    wanted = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(fisher({"logits": logits}, inputs()), wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        ({"logits": torch.tensor([[0.7]])}, None),
        ({"logits": torch.tensor([[0.7, 0.1]])}, "regression"),
        ({"last_hidden_state": torch.zeros(1, 1, 3)}, None),
    ],
)
def test_numbers_have_unit_variance(outputs: dict[str, torch.Tensor], problem: str | None) -> None:
    found = fisher(outputs, inputs(), problem)
    torch.testing.assert_close(found, torch.eye(len(found)), atol=0.08, rtol=0)


def test_several_labels_are_independent() -> None:
    logits = torch.tensor([[0.5, -1.0]])
    p = logits[0].sigmoid()
    found = fisher({"logits": logits}, inputs(), "multi_label_classification")
    torch.testing.assert_close(found, torch.diag(p * (1 - p)), atol=0.03, rtol=0)


def test_both_ends_of_a_span_count() -> None:
    start, end = torch.zeros(1, 2), torch.zeros(1, 2)
    wanted = torch.full((2, 2), -0.25) + torch.eye(2) / 2
    for outputs in ({"start_logits": start, "end_logits": end},):
        torch.testing.assert_close(fisher(outputs, inputs(2)), wanted, atol=0.03, rtol=0)


def test_padding_counts_for_nothing() -> None:
    logits = torch.randn(1, 2, 3)
    mask = torch.tensor([[1, 0]])
    found = fisher({"logits": logits}, inputs(2, attention_mask=mask))
    assert bool(found[:3, :3].any()) and not bool(found[3:].any())


def test_the_task_s_own_loss_is_taken_where_there_are_labels() -> None:
    loss = torch.tensor(0.5)
    batch = {"input_ids": torch.zeros(4, 1), "labels": torch.zeros(4)}
    outputs = SimpleNamespace(loss=loss, logits=torch.zeros(4, 2))
    assert drawn_loss(outputs, batch, torch.Generator()) == 2.0


def test_what_nobody_knows_is_refused() -> None:
    class Outputs(dict[str, torch.Tensor]):
        pass

    with pytest.raises(ValueError, match=r"answers \['pooled'\].*`fit: gram` and a uniform"):
        drawn_loss(Outputs(pooled=torch.zeros(1, 2)), inputs(), torch.Generator())


def test_the_loss_of_images_is_summed_over_them() -> None:
    images = {"pixel_values": torch.zeros(6, 3, 4, 4)}
    given = SimpleNamespace(loss=torch.tensor(0.5))
    assert float(drawn_loss(given, images, torch.Generator())) == 3.0
    logits = torch.zeros(6, 3, requires_grad=True)
    found = drawn_loss(SimpleNamespace(logits=logits), images, torch.Generator())
    assert float(found.detach()) == pytest.approx(6 * torch.tensor(3.0).log().item())
