"""The contexts of our own passes leave the model as they found it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.passes.context import (
    evaluation_forward,
    frozen,
    on_device,
    replaced_forward,
    trial,
)


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.fixture
def model(small_llama: Callable[..., Any]) -> Any:
    return small_llama(0, num_hidden_layers=2)


def test_another_forward_answers_and_hooks_still_run() -> None:
    module, seen = Double(), []
    module.register_forward_hook(lambda *_: seen.append(1))
    x = torch.ones(2)
    with replaced_forward(module, lambda x: 3 * x):
        assert torch.equal(module(x), 3 * x)
    assert torch.equal(module(x), 2 * x) and len(seen) == 2
    assert "forward" not in vars(module)  # the class's own is not hidden


def test_contexts_can_be_nested_and_errors_restore_too() -> None:
    module, x = Double(), torch.ones(2)
    with pytest.raises(KeyError), replaced_forward(module, lambda x: 3 * x):
        with replaced_forward(module, lambda x: 4 * x):
            assert torch.equal(module(x), 4 * x)
        assert torch.equal(module(x), 3 * x)
        raise KeyError
    assert torch.equal(module(x), 2 * x)


def test_what_stood_on_the_instance_stands_there_again() -> None:
    module = Double()
    module.forward = own = lambda x: 5 * x  # type: ignore[method-assign]
    with replaced_forward(module, lambda x: 3 * x):
        pass
    assert vars(module)["forward"] is own


def test_the_parameters_themselves_are_frozen(offloaded_llama: nn.Module) -> None:
    from compressed_tensors.offload import disable_onloading

    with frozen(offloaded_llama), disable_onloading():
        assert not any(p.requires_grad for p in offloaded_llama.parameters())
    with disable_onloading():
        assert all(p.requires_grad for p in offloaded_llama.parameters())


def test_what_was_frozen_before_stays_so() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_only_tensors_are_moved() -> None:
    batch = {"input_ids": torch.ones(1, 2), "use_cache": False, "names": ["a"]}
    moved = on_device(batch, torch.device("meta"))
    assert moved["input_ids"].is_meta and moved["names"] is batch["names"]
    assert not batch["input_ids"].is_meta


@pytest.mark.parametrize("logits", [False, True])
def test_a_pass_evaluates_and_leaves_training_as_it_was(model: Any, logits: bool) -> None:
    model.train()
    with evaluation_forward(model, logits=logits) as device, torch.no_grad():
        assert device == torch.device("cpu") and not model.training
        out = model(torch.zeros(1, 4, dtype=torch.long))
        assert out.past_key_values is None
        assert out.logits.is_meta != logits or out.logits.shape[-1] == (64 if logits else 0)
    assert model.training and model.config.use_cache


def test_modules_can_be_called_again_as_they_were_in_a_trial(model: Any) -> None:
    seen: list[tuple[Any, ...]] = []
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    with trial(model) as run:
        run()
        args, kwargs, out = seen[0]
        assert not out.requires_grad
        torch.testing.assert_close(layer(*args, **kwargs), out)
    handle.remove()


def test_a_trial_of_given_inputs(small_resnet: Callable[..., Any], images: Any) -> None:
    model = small_resnet(0)
    found: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda _, args, out: found.append(out.logits))
    with trial(model, images[0]) as run:
        run()
    handle.remove()
    assert found[0].shape == (4, 5) and not found[0].requires_grad
