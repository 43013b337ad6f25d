"""MPIFA: low-rank factors re-solved on the compressed model's own inputs, stored as a row ID.

The reconstruction of "PIFA: pivoting factorization" (2025), with our streams: a layer is factored
after those before it, on what the compressed model feeds it; the targets lean to the dense model.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from cur_modifier.forms.sizes import FORMS
from cur_modifier.linalg import anchored_target, low_rank, shrunk
from cur_modifier.passes.context import frozen
from cur_modifier.passes.streams import LayerStreams
from mlflow_projects.bench.quality.calibration import projections

__all__ = ["mpifa", "reconstruct"]

DENSE_SHARE = 0.25  # of the dense model's inputs in the targets
SHRINKAGE = 1e-6  # keeps a singular Gram matrix solvable, and no more


def reconstruct(
    W: torch.Tensor, gram: torch.Tensor, drift: torch.Tensor, rank: int
) -> torch.Tensor:
    """``U Vᵀ (m, n)`` of rank ``r``: whitened SVD, then ``U``, then ``V`` by least squares.

    With ``T x̃`` the best prediction of the mixed target, ``U = T G V (Vᵀ G V)⁻¹`` and then
    ``Vᵀ = U⁺ T``: the data enter the second step through ``T`` alone, as the inputs have full rank.
    """
    right = low_rank(W, rank, gram).B.double()
    target = anchored_target(W, gram, drift, DENSE_SHARE)
    weighted = right @ gram
    left = torch.linalg.solve(weighted @ right.mT, weighted @ target.mT).mT
    return left @ torch.linalg.lstsq(left, target).solution


def mpifa(model: Any, windows: torch.Tensor, ratio: float | None) -> float:
    """Replace every projection by its reconstruction, layer by layer; the ratio that is stored."""
    assert ratio is not None
    linears = projections(model)
    before = after = 0
    layers = list(model.model.layers)
    batches = [{"input_ids": window[None], "use_cache": False} for window in windows]
    with torch.no_grad(), frozen(model):
        streams = LayerStreams(model, layers, batches, windows.device)
        for index in tqdm(range(len(layers)), desc="Factoring layers", leave=False):
            prefix = f"model.layers.{index}."
            own = {name: m for name, m in linears.items() if name.startswith(prefix)}
            outputs, inputs, groups = streams.run_dense(own, keep_inputs=True)
            for group in groups:
                first = own[group[0]]
                gram, drift = streams.moments(first, inputs[group[0]], first.in_features).moments()
                gram = shrunk(gram, SHRINKAGE)
                for name in group:
                    W = own[name].weight
                    m, n = W.shape
                    rank = FORMS["id"].ratio_rank(m, n, ratio)
                    W.copy_(reconstruct(W, gram, drift.to(gram), rank))
                    before += m * n
                    after += FORMS["id"].parameters(m, n, rank)
            streams.advance(outputs, changed=True)
    return after / before
