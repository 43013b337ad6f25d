"""Every baseline against the formula in its paper, written out as the paper has it, in float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from cur_modifier.forms.sizes import FORMS
from cur_modifier.linalg import gram_norm, shrunk
from mlflow_projects.bench.quality.baselines import (
    Factored,
    Inputs,
    asvd,
    curing,
    svd,
    svd_llm,
    svd_llm_id,
)
from mlflow_projects.bench.quality.mpifa import SHRINKAGE, mpifa, reconstruct

SHAPES = [(24, 24), (12, 40), (40, 12)]
RATIO = 0.6


@pytest.fixture(params=SHAPES, ids=str)
def problem(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight ``(m, n)`` and correlated inputs ``(n, tokens)`` of unequal scales."""
    m, n = request.param
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    scales = torch.randn(n, 1, **draw).exp()
    mixing = torch.eye(n, dtype=torch.float64) + 0.3 * torch.randn(n, n, **draw)
    return torch.randn(m, n, **draw), scales * (mixing @ torch.randn(n, 8 * n, **draw))


def inputs_of(X: torch.Tensor) -> Inputs:
    return Inputs(X @ X.mT / X.shape[1], X.abs().mean(dim=1))


def truncated(A: torch.Tensor, rank: int) -> torch.Tensor:
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :rank] @ torch.diag(s[:rank]) @ Vh[:rank]


def check(factored: Factored, expected: torch.Tensor, stored: int) -> None:
    torch.testing.assert_close(factored.product, expected, rtol=1e-6, atol=1e-6)
    assert factored.stored == stored <= RATIO * expected.numel()


def test_svd(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    W, _ = problem
    m, n = W.shape
    rank = int(RATIO * m * n / (m + n))
    check(svd(W, None, RATIO), truncated(W, rank), rank * (m + n))


def test_asvd(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    W, X = problem
    m, n = W.shape
    rank = int(RATIO * m * n / (m + n))
    S = torch.diag(X.abs().mean(dim=1) ** 0.5)
    expected = truncated(W @ S, rank) @ torch.linalg.inv(S)
    check(asvd(W, inputs_of(X), RATIO), expected, rank * (m + n))


def test_svd_llm(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    W, X = problem
    m, n = W.shape
    rank = int(RATIO * m * n / (m + n))
    S = torch.linalg.cholesky(X @ X.mT)
    expected = truncated(W @ S, rank) @ torch.linalg.inv(S)
    check(svd_llm(W, inputs_of(X), RATIO), expected, rank * (m + n))


def test_svd_llm_at_the_rank_of_a_row_id(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    W, X = problem
    m, n = W.shape
    rank = max(r for r in range(1, min(m, n) + 1) if r * (m + n - r) <= RATIO * m * n)
    assert rank > FORMS["low_rank"].ratio_rank(m, n, RATIO)
    S = torch.linalg.cholesky(X @ X.mT)
    expected = truncated(W @ S, rank) @ torch.linalg.inv(S)
    stored = FORMS["id"].parameters(m, n, rank)
    check(svd_llm_id(W, inputs_of(X), RATIO), expected, stored)


def test_curing(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    W, X = problem
    m, n = W.shape
    rank = max(r for r in range(1, min(m, n) + 1) if r * (m + n + r) <= RATIO * m * n)
    importance = W.abs() * torch.linalg.vector_norm(X, dim=1)  # WANDA
    U, _, Vh = torch.linalg.svd(importance, full_matrices=False)
    rows, columns = textbook_deim(U[:, :rank]), textbook_deim(Vh[:rank].mT)
    C, R = W[:, columns], W[rows]
    expected = C @ torch.linalg.pinv(C) @ W @ torch.linalg.pinv(R) @ R
    check(curing(W, inputs_of(X), RATIO), expected, rank * (m + n + rank))


def textbook_deim(V: torch.Tensor) -> list[int]:
    """Sorensen and Embree 2016, algorithm 1."""
    chosen = [int(V[:, 0].abs().argmax())]
    for j in range(1, V.shape[1]):
        c = torch.linalg.solve(V[chosen, :j], V[chosen, j])
        chosen.append(int((V[:, j] - V[:, :j] @ c).abs().argmax()))
    return chosen


def test_each_is_the_best_in_its_own_norm(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    W, X = problem
    inputs = inputs_of(X)
    norms = {svd: None, asvd: inputs.mean_abs, svd_llm: inputs.gram}
    for best, norm in norms.items():
        errors = {f: gram_norm(W - f(W, inputs, RATIO).product, norm) for f in norms}
        assert min(errors, key=errors.__getitem__) is best


def test_mpifa_solves_one_factor_after_the_other_on_the_compressed_stream() -> None:
    generator = torch.Generator().manual_seed(4)
    m, n, rank = 14, 9, 4
    W = torch.randn(m, n, generator=generator).double()
    dense = torch.randn(60, n, generator=generator).double()
    x = dense + 0.2 * torch.randn(60, n, generator=generator)
    gram, drift = x.T @ x / 60, (dense - x).T @ x / 60
    # The paper's steps on the data themselves.
    root = torch.linalg.cholesky(gram)
    right = torch.linalg.svd(W @ root).Vh[:rank] @ torch.linalg.inv(root)
    wanted = (0.25 * dense + 0.75 * x) @ W.T
    left = torch.linalg.lstsq(x @ right.T, wanted).solution.T
    right = torch.linalg.lstsq(left, (torch.linalg.pinv(x) @ wanted).T).solution
    torch.testing.assert_close(reconstruct(W, gram, drift, rank), left @ right)


def test_mpifa_sees_what_the_layers_before_it_have_become(
    small_llama: Callable[..., nn.Module],
) -> None:
    model = small_llama(5, num_hidden_layers=3, initializer_range=0.3).double()
    windows = torch.randint(0, 64, (8, 16))
    dense, wanted = deepcopy(model), deepcopy(model)
    for names in groups_in_order(wanted):
        x, seen = (inputs_of_module(each, names[0], windows) for each in (dense, wanted))
        gram, drift = seen.T @ seen / len(seen), (x - seen).T @ seen / len(seen)
        gram = shrunk(gram, SHRINKAGE)  # what o reads has the rank of v
        for name in names:
            weight = wanted.get_submodule(name).weight
            rank = FORMS["id"].ratio_rank(*weight.shape, RATIO)
            with torch.no_grad():
                weight.copy_(reconstruct(weight, gram, drift, rank))
    mpifa(model, windows, RATIO)
    with torch.no_grad():  # what inputs never do, weights may do as they like
        logits, expected, before = (m(input_ids=windows).logits for m in (model, wanted, dense))
    assert (logits - expected).abs().max() < 1e-3 * (expected - before).abs().max()


def groups_in_order(model: nn.Module) -> list[list[str]]:
    """Projections by the tensor that they read."""
    readers = [("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ["gate", "up"]), ("mlp", ["down"])]
    return [
        [f"model.layers.{layer}.{part}.{name}_proj" for name in names]
        for layer in range(len(model.model.layers))
        for part, names in readers
    ]


def inputs_of_module(model: nn.Module, name: str, windows: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=windows)
    handle.remove()
    return found[0]
