"""The published methods on one weight ``W (m, n)``, each a setting of :mod:`cur_modifier.linalg`.

Every function takes ``W``, what was seen of its inputs ``x (n,)``, and the ratio of parameters
stored after ÷ before, and returns the *product* of the factors with the number of parameters that
storing the factors takes. Evaluating the product is the same mathematics as evaluating the factors,
and rounds once where they round two or three times (float32). ``test_baselines.py`` in
``tests/mlflow_projects/bench`` holds each to the formula in its paper.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cur_modifier.forms.sizes import FORMS
from cur_modifier.linalg import (
    Score,
    Selection,
    cur,
    low_rank,
    score,
    select_rows_and_columns,
)

__all__ = ["Factored", "Inputs", "asvd", "curing", "svd", "svd_llm", "svd_llm_id"]


class Inputs(NamedTuple):
    """Statistics of a weight's inputs: ``E[x xᵀ] (n, n)`` and ``E|x| (n,)``."""

    gram: torch.Tensor
    mean_abs: torch.Tensor


class Factored(NamedTuple):
    """``product (m, n)`` of factors that hold ``stored`` parameters, a bias not counted."""

    product: torch.Tensor
    stored: int


def svd(W: torch.Tensor, inputs: Inputs | None, ratio: float) -> Factored:
    """Truncated SVD: minimises ``‖W − Ŵ‖_F``. No activations.

    Source: Eckart and Young 1936.
    """
    return _pair(W, None, ratio)


def asvd(W: torch.Tensor, inputs: Inputs, ratio: float) -> Factored:
    """ASVD: ``(W S)_r S⁻¹`` with ``S = diag((E|x_j|)^α)``, ``α = 0.5``; minimises
    ``‖(W − Ŵ) S‖_F``, so the diagonal ``S²`` is our Gram matrix.

    Its search for a rank for each layer is left out: under protocol P all share one ratio.

    Source: Yuan et al. 2023 (ASVD), section 3.3.
    """
    return _pair(W, inputs.mean_abs, ratio)


def svd_llm(W: torch.Tensor, inputs: Inputs, ratio: float) -> Factored:
    """SVD-LLM's whitening: ``(W L)_r L⁻¹`` with the Cholesky factor ``L Lᵀ = E[x xᵀ]``; minimises
    ``E‖(W − Ŵ) x‖²``. Its parameter update by LoRA is left out.

    Any other square root of the Gram matrix gives the same product, so ours needs none, and takes a
    singular one.

    Source: Wang et al. 2024 (SVD-LLM), section 3.1.
    """
    return _pair(W, inputs.gram, ratio)


def svd_llm_id(W: torch.Tensor, inputs: Inputs, ratio: float) -> Factored:
    """The same, stored as a row ID: ``r(m + n − r)`` parameters, so a higher rank at equal size."""
    m, n = W.shape
    rank = FORMS["id"].ratio_rank(m, n, ratio)
    product = low_rank(W, rank, inputs.gram).dense()
    return Factored(product, FORMS["id"].parameters(m, n, rank))


def curing(W: torch.Tensor, inputs: Inputs, ratio: float) -> Factored:
    """CURing: rows and columns by DEIM on the singular vectors of ``|W| diag(‖x_j‖)``, and
    ``U = C⁺ W R⁺``.

    Source: Park and Moon 2025 (CURing), section 4.
    """
    m, n = W.shape
    rank = FORMS["cur"].ratio_rank(m, n, ratio)
    scored = score(Score.WANDA, W, inputs.gram)
    rows, columns = select_rows_and_columns(Selection.DEIM, scored, rank)
    return Factored(cur(W, rows, columns).dense(), FORMS["cur"].parameters(m, n, rank))


def _pair(W: torch.Tensor, gram: torch.Tensor | None, ratio: float) -> Factored:
    m, n = W.shape
    rank = FORMS["low_rank"].ratio_rank(m, n, ratio)
    return Factored(low_rank(W, rank, gram).dense(), FORMS["low_rank"].parameters(m, n, rank))
