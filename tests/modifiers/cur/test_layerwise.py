"""Layer after layer, dense beside compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.forms.base import factored_layers
from cur_modifier.modifiers.cur.layerwise import LayerwiseEngine

from .stages import Q, prepared, stage

Recipe = Callable[..., Any]


def fitted(model: Any, batches: Any, recipe: Recipe, **fields: Any) -> Any:
    """Fit the stage's modules; its journal's records."""
    settings = stage(**{"layers": {"select": "all"}} | fields)
    installed, fitting = prepared(settings, model, batches, recipe)
    engine = LayerwiseEngine(installed, fitting)
    assert not engine.needs_pipeline and len(engine.unfitted()) == len(installed)
    engine.start(model, batches)
    engine.layer_done(list(model.modules()))
    assert engine.unfitted() == []
    return fitting.journal


@torch.no_grad()
def outputs(model: Any, batches: Any) -> torch.Tensor:
    return torch.cat([model(**batch).logits for batch in batches])


def test_all_is_fitted_when_the_calibration_begins(
    model: Any, batches: Any, recipe: Recipe
) -> None:
    journal = fitted(model, batches, recipe, anchor=0.5)
    assert len(factored_layers(model)) == 21
    assert all(layer.dense is None for layer in factored_layers(model).values())
    assert all(record.tokens == 96 for record in journal.records.values())
    assert all(p.requires_grad for p in model.parameters())


def test_an_anchor_of_zero_is_none_of_the_dense_model(
    small_llama: Callable[..., Any], batches: Any, recipe: Recipe
) -> None:
    """The first modules of the first layer read the same in both models, whatever the anchor."""
    first, found = "model.layers.0.self_attn.q_proj", []
    for anchor in (0.0, 1.0):
        model = small_llama(0, num_hidden_layers=2)
        fitted(model, batches, recipe, anchor=anchor)
        layers = factored_layers(model)
        found.append([layers[n].dense_weight() for n in (first, "model.layers.1.mlp.down_proj")])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)
    assert float((found[0][1] - found[1][1]).norm()) > 1e-2 * float(found[0][1].norm())


def test_refining_is_kept_only_where_it_helps(
    model: Any, batches: Any, recipe: Recipe, tmp_path: Any
) -> None:
    cache = {"cache": str(tmp_path / "measured.safetensors")}
    settings = {"refine": {"epochs": 2, "batch_size": 2}, "sensitivity": cache}
    journal = fitted(model, batches, recipe, **settings)
    assert len(journal._refined) == 3
    assert all(r.after <= r.before for r in journal._refined)
    assert any(r.kept for r in journal._refined)


def test_a_module_that_no_token_reaches_stays_unfitted(
    model: Any, batches: Any, recipe: Recipe
) -> None:
    installed, fitting = prepared(stage(anchor=0.5), model, batches, recipe)
    attention = model.model.layers[1].self_attn
    q = attention.q_proj
    attention.q_proj = q.dense  # the model runs another in its place
    engine = LayerwiseEngine(installed, fitting)
    engine.start(model, batches)
    assert engine.unfitted() == [Q] and q.dense is not None
