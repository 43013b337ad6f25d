"""Targets that make a compressed layer compute what the dense model would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cur_modifier.linalg import (
    PairedMoments,
    anchored_target,
    shrunk,
)

from .strategies import (
    SEEDS,
    SHAPES,
    gaussian,
    seeded,
    weight_and_metrics,
)


@given(SEEDS, SHAPES, st.floats(0, 1))
def test_the_anchored_target_is_the_least_squares_map(seed, shape, anchor):
    W, _, _, generator = weight_and_metrics(seed, shape)
    n = shape[1]
    dense = gaussian(4 * n + 4, n, generator)
    compressed = dense + 0.3 * gaussian(4 * n + 4, n, generator)
    moments = PairedMoments(n)
    moments._gram, moments._drift = moments._gram.double(), moments._drift.double()
    for x, other in zip(compressed.split(5), dense.split(5), strict=True):
        moments.update(x, other)
    gram, drift = moments.moments()
    target = anchored_target(W, gram, drift, anchor)
    wanted = (anchor * dense + (1 - anchor) * compressed) @ W.T
    best = torch.linalg.lstsq(compressed, wanted).solution.T
    torch.testing.assert_close(target, best, atol=1e-6, rtol=1e-6)


@given(SEEDS, st.integers(2, 10))
def test_without_drift_every_anchor_keeps_the_weight(seed, n):
    W, gram, _, _ = weight_and_metrics(seed, (n, n))
    target = anchored_target(W, shrunk(gram, 0.01), torch.zeros_like(gram), 0.7)
    torch.testing.assert_close(target, W)


def test_bad_anchors_are_refused():
    W = gaussian(4, 5, seeded(0))
    with pytest.raises(ValueError, match="outside"):
        anchored_target(W, torch.eye(5), torch.eye(5), 2.0)
    with pytest.raises(ValueError, match="singular"):
        anchored_target(W, torch.zeros(5, 5), torch.eye(5), 0.5)
