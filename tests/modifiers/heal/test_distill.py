"""Student and teacher in one model, and the distance between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llmcompressor")

from cur_modifier.forms.base import answering_dense, factored_layers
from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import Shape
from cur_modifier.linalg import Problem
from cur_modifier.modifiers.heal.distill import Distillation
from cur_modifier.passes.samples import collect_samples
from cur_modifier.structure.layers import decoder_layers

NAMES = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def factor(model: Any, form: str, rank: int) -> None:
    """Factored layers that keep their dense ones."""
    for name in NAMES:
        dense = model.get_submodule(name)
        m, n = dense.weight.shape
        layer = find_form(form).build(Shape(m, n, rank), bias=False)
        layer.stand_in(dense)
        layer.keep_dense()
        factors = find_form(form).solve(Problem(W=dense.weight.detach(), rank=rank))
        find_form(form).load([layer], factors, [None])
        model.set_submodule(name, layer)


@pytest.fixture
def distill(model: Any, batches: Any) -> Callable[..., Distillation]:
    def make(form: str = "cur", rank: int = 4, **fields: Any) -> Distillation:
        factor(model, form, rank)
        given = {"autocast": False, "logits": False, "cache_bytes": 2.0**30} | fields
        return Distillation(
            model, factored_layers(model), decoder_layers(model), collect_samples(batches), **given
        )

    return make


@pytest.mark.parametrize("form", ["cur", "id", "low_rank"])
def test_a_student_with_the_dense_weights_is_at_no_distance(
    model: Any, distill: Callable[..., Distillation], form: str
) -> None:
    rank = 15 if form == "id" else 16
    for name in NAMES if form == "id" else []:  # a row ID has no full rank for these shapes
        W = model.get_submodule(name).weight
        W.data[-1] = W.data[0]
    with distill(form, rank, logits=True) as distillation:
        moments = distillation.measure([0, 1])
        loss = distillation.loss(2)
    assert float(loss.layers) < 1e-4 and abs(float(loss.logits)) < 1e-4
    assert all(m.error < 1e-6 for m in moments.values())


def test_the_loss_has_gradients_to_the_free_factors_alone(
    model: Any, distill: Callable[..., Distillation]
) -> None:
    with distill() as distillation:
        distillation.measure([0, 1])
        assert distillation.values.keys() == set(NAMES)
        for name, value in distillation.values.items():
            distillation.values[name] = value.clone().requires_grad_()
        loss = distillation.loss(0)
        loss.layers.backward()
        assert all(bool(v.grad.any()) for v in distillation.values.values())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_floors_are_below_errors_and_reached_by_the_best_factor(
    model: Any, distill: Callable[..., Distillation]
) -> None:
    with distill() as distillation:
        moments = distillation.measure([0, 1, 2])
    for name, measured in moments.items():
        layer = factored_layers(model)[name]
        assert 0 < measured.floor <= measured.error < 2
        r = layer.rank
        assert measured.inputs.shape == (r, r) and measured.output.shape == (r, r)


def test_the_teacher_runs_again_where_its_outputs_do_not_fit(
    model: Any, distill: Callable[..., Distillation], logged: list[str]
) -> None:
    losses = []
    for cache_bytes in (2.0**30, 0.0):
        for name in NAMES:
            layer = model.get_submodule(name)
            model.set_submodule(name, getattr(layer, "teacher", None) or layer)
        with distill(cache_bytes=cache_bytes) as distillation:
            distillation.measure([0, 1])
            losses.append([float(distillation.loss(k).layers) for k in range(3)])
    assert losses[0] == losses[1]
    assert any("the dense model runs again for every sample" in m for m in logged)


def test_the_model_is_left_as_it_was(
    model: Any, batches: Any, distill: Callable[..., Distillation]
) -> None:
    distillation = distill()
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(**batches[0]).logits
    with distillation:
        distillation.measure([0])
        distillation.loss(1)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, expected)
        with answering_dense(model):
            assert not torch.equal(model(**batches[0]).logits, expected)
