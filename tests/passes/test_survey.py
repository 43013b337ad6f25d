"""Angular distance, and how large inputs are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.passes.survey import angular_distance, survey


def test_angles() -> None:
    x = torch.tensor([[1.0, 0.0]])
    assert angular_distance(x, 3 * x) == pytest.approx(0, abs=1e-7)
    assert angular_distance(x, torch.tensor([[0.0, 2.0]])) == pytest.approx(0.5)
    assert angular_distance(x, -x) == pytest.approx(1)
    both = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    assert angular_distance(x.expand(2, 2), both) == pytest.approx(0.25 + 1)
    assert math.isnan(angular_distance(x, x * math.nan))


@pytest.fixture
def model(small_llama: Callable[..., Any]) -> Any:
    return small_llama(0, num_hidden_layers=3)


def layers(model: Any) -> list[nn.Module]:
    return list(model.model.layers)


def batches(count: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return [
        {"input_ids": torch.randint(0, 64, (2, 6), generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


def test_a_layer_that_changes_nothing_turns_nothing(model: Any) -> None:
    """The residual is all that passes a layer whose last Linears are zero."""
    silent = model.model.layers[1]
    for linear in (silent.self_attn.o_proj, silent.mlp.down_proj):
        nn.init.zeros_(linear.weight)
    turned, _ = survey(model, batches(), layers(model), {})
    assert turned[1] == pytest.approx(0, abs=1e-6)
    assert all(0 < distance < 1 for distance in (turned[0], turned[2]))


def test_distances_are_means_over_samples(model: Any) -> None:
    given = batches()
    whole, _ = survey(model, given, layers(model), {})
    halves = [survey(model, [each], layers(model), {})[0] for each in given]
    for index, distance in enumerate(whole):
        assert distance == pytest.approx(sum(half[index] for half in halves) / 2, rel=1e-4)


def test_mean_squares_count_real_tokens_alone(model: Any) -> None:
    given = batches()
    module = model.model.layers[0].self_attn.q_proj
    read: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    _, squares = survey(model, given, layers(model), {"q": module})
    handle.remove()
    rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(read, given, strict=True)])
    torch.testing.assert_close(squares["q"], rows.float().square().mean(0))


def test_a_module_that_nothing_reaches_has_no_mean(model: Any) -> None:
    _, squares = survey(model, batches(), layers(model), {"nowhere": nn.Linear(2, 2)})
    assert squares == {}


def test_a_broken_layer_is_named_and_hooks_are_gone(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"decoder layer 1 produces NaN.*dtype"):
        survey(model, batches(), layers(model), {"q": model.model.layers[0].self_attn.q_proj})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
