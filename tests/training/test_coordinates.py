"""Coordinates in which the loss of a factor is round."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.training.coordinates import Coordinates, inverse_root


@given(
    p=st.integers(1, 8),
    q=st.integers(1, 8),
    left=st.booleans(),
    right=st.booleans(),
    seed=st.integers(0, 999),
)
def test_coordinates_are_round(p: int, q: int, left: bool, right: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    F0 = torch.randn(p, q, generator=generator)
    L = torch.randn(p + 3, p, generator=generator) if left else torch.eye(p)
    Z = torch.randn(q, 4 * q, generator=generator) if right else torch.eye(q) * math.sqrt(q)
    inputs = Z @ Z.T / Z.shape[1] if right else None
    output = L.T @ L if left else None
    coordinates = Coordinates(F0, output, inputs)
    assert torch.equal(coordinates.at(coordinates.D), F0)
    # The unit is the root mean square of an output, spread over the entries.
    energy = (L @ F0 @ Z).square().sum() / Z.shape[1]
    assert coordinates.unit == pytest.approx(math.sqrt(energy / F0.numel()), rel=1e-3)
    # The gradient of D is the chain rule's.
    target = torch.randn(p, q, generator=generator)
    (coordinates.value * target).sum().backward()
    coordinates.pull_gradient()
    D = torch.zeros(p, q, requires_grad=True)
    (coordinates.at(D) * target).sum().backward()
    torch.testing.assert_close(coordinates.D.grad, D.grad, rtol=1e-4, atol=1e-5)
    assert coordinates.value.grad is None


def test_a_change_of_one_entry_is_worth_the_same_everywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(12, 4, generator=generator) @ torch.diag(torch.tensor([1.0, 3, 0.3, 9]))
    Z = torch.diag(torch.tensor([5.0, 0.5, 2.0])) @ torch.randn(3, 4000, generator=generator)
    coordinates = Coordinates(torch.randn(4, 3), L.T @ L, Z @ Z.T / 4000)
    effects = []
    for entry in range(12):
        D = torch.zeros(12)
        D[entry] = 1
        change = coordinates.at(D.view(4, 3)) - coordinates.start
        effects.append(float((L @ change @ Z).square().sum() / 4000))
    assert max(effects) < 2 * min(effects)  # 90,000 in entries of F; damping keeps it from 1


def test_inverse_root_of_nothing_is_the_identity() -> None:
    assert torch.equal(inverse_root(torch.zeros(3, 3)), torch.eye(3))


@given(p=st.integers(1, 6), q=st.integers(1, 6), left=st.booleans(), seed=st.integers(0, 999))
def test_no_metric_is_the_identity(p: int, q: int, left: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    F0, D = torch.randn(2, p, q, generator=generator)
    L = torch.randn(p, p, generator=generator)
    output = L.T @ L if left else None
    none, identity = Coordinates(F0, output, None), Coordinates(F0, output, torch.eye(q))
    assert none.unit == pytest.approx(identity.unit)
    # The identity is damped a little on its way to an inverse root.
    torch.testing.assert_close(none.at(D), identity.at(D), rtol=0.05, atol=0.05 * float(D.norm()))
    if not left:
        assert torch.equal(none.at(D), F0 + D)


def test_what_has_no_metric_is_trained_as_it_is() -> None:
    F0 = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    coordinates = Coordinates(F0, None, None)
    assert coordinates.unit == pytest.approx(float(F0.square().mean().sqrt()))
    coordinates.value.square().sum().backward()
    coordinates.pull_gradient()
    torch.testing.assert_close(coordinates.D.grad, 2 * F0)
    with torch.no_grad():
        coordinates.D.add_(1)
    coordinates.push()
    torch.testing.assert_close(coordinates.value.detach(), F0 + 1)
    coordinates.pull_gradient()
    assert not coordinates.D.grad.any()  # none has come since
