"""Fitting behind llm-compressor's pipeline, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.linalg import gram_norm
from cur_modifier.modifiers.cur.hooks import HookEngine

from .stages import DOWN, GATE, UP, K, Q, prepared, stage

Recipe = Callable[..., Any]


def engine_of(settings: Any, model: Any, batches: Any, recipe: Recipe) -> tuple[HookEngine, Any]:
    installed, fitting = prepared(settings, model, batches, recipe)
    return HookEngine(installed, fitting, settings.register_hook), fitting


@torch.no_grad()
def run(model: Any, batches: Any) -> None:
    for batch in batches:
        model(**batch, use_cache=False)


def test_a_layer_is_fitted_to_what_its_modules_read(
    model: Any, batches: Any, recipe: Recipe
) -> None:
    settings = stage(targets=["re:.*(q|k|down)_proj$"])
    engine, fitting = engine_of(settings, model, batches, recipe)
    read: dict[str, list[torch.Tensor]] = {Q: [], DOWN: []}
    for name, seen in read.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2))
        )
    dense = {name: model.get_submodule(name).dense.weight.detach().clone() for name in read}
    assert engine.needs_pipeline
    engine.start(model, batches)
    run(model, batches)
    assert engine.unfitted() == [Q, K, DOWN]
    engine.layer_done(list(model.model.layers[1].modules()))
    assert engine.unfitted() == []
    for name, seen in read.items():
        x = torch.cat(seen)
        G = x.T @ x / len(x)
        W, layer = dense[name], model.get_submodule(name)
        error = gram_norm(W - layer.dense_weight(), G) / gram_norm(W, G)
        assert fitting.journal.records[name].relative_error == pytest.approx(error, rel=1e-3)
        assert fitting.journal.records[name].tokens == len(x)


def test_modules_wait_until_all_that_they_share_with_have_run(
    model: Any, batches: Any, recipe: Recipe
) -> None:
    settings = stage(targets=["re:.*(gate|up)_proj$"], share_skeleton=True)
    engine, _ = engine_of(settings, model, batches, recipe)
    engine.start(model, batches)
    run(model, batches)
    engine.layer_done([model.get_submodule(GATE)])
    assert engine.unfitted() == [f"{GATE}+up_proj"]
    engine.layer_done([model.get_submodule(UP)])
    assert engine.unfitted() == []


def test_without_activations_no_hook_is_registered(model: Any, recipe: Recipe) -> None:
    engine, _ = engine_of(stage(fit="weight"), model, None, recipe)
    engine.start(model, None)
    assert not engine.needs_pipeline
    assert not any(m._forward_pre_hooks for m in model.modules())
    engine.layer_done(list(model.modules()))
    assert engine.unfitted() == []


def test_a_module_that_no_token_reached_is_named(model: Any, batches: Any, recipe: Recipe) -> None:
    engine, _ = engine_of(stage(targets=["re:.*q_proj$"]), model, batches, recipe)
    engine.start(model, batches)
    with pytest.raises(ValueError, match=rf"{Q}: no token reached this module.*`ignore`"):
        engine.layer_done([model.get_submodule(Q)])


def test_broken_activations_are_said_of_the_module(
    model: Any, batches: Any, recipe: Recipe
) -> None:
    engine, _ = engine_of(stage(targets=["re:.*q_proj$"]), model, batches, recipe)
    engine.start(model, batches)
    nn.init.constant_(model.model.layers[1].input_layernorm.weight, torch.nan)
    run(model, batches)
    with pytest.raises(ValueError, match=rf"{Q}: the activations' second moment contains NaN"):
        engine.layer_done(list(model.modules()))
