"""Which rank each candidate gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from cur_modifier.forms.form import Form
from cur_modifier.forms.sizes import dense_parameters
from cur_modifier.linalg import RankCurve, allocate_ranks, truncation_tail
from cur_modifier.modifiers.cur.candidates import Candidate
from cur_modifier.modifiers.cur.config import RankConfig

__all__ = ["expected_growth", "with_budget", "with_ranks"]


def with_ranks(
    candidates: Sequence[Candidate],
    form: Form,
    rank: RankConfig,
    multiple_of: int,
    energies: dict[str, int] | None = None,
) -> list[Candidate]:
    """The candidates with their ranks; those that stay dense keep ``rank=None``.

    Raises:
        ValueError: no rank meets the wish for a module, naming it.
    """
    planned = []
    for candidate in candidates:
        m, n = candidate.shape
        needed = energies.get(candidate.name) if energies is not None else None
        try:
            chosen = rank.choose(
                form, m, n, bias=candidate.bias, multiple_of=multiple_of, needed=needed
            )
        except ValueError as error:
            raise ValueError(f"{candidate.name}: {error}") from None
        planned.append(replace(candidate, rank=chosen))
    return planned


def expected_growth(
    candidates: Sequence[Candidate],
    form: Form,
    rank: RankConfig,
    multiple_of: int,
    spectra: Mapping[str, torch.Tensor],
    layers: int,
) -> list[float]:
    """By layer, the growth of the loss in nats a token that its factors are expected to cost.

    Half of what the best approximation of each module's rank leaves of its spectrum: second order,
    every module by itself. Infinite for a layer without candidates.

    Args:
        rank: a rule that needs no data. Where it is a budget, its ratio counts for every module.
        spectra: squared singular values of every weight in the metric of the loss.
    """
    uniform = rank.model_copy(update={"budget": "uniform"})
    growth: dict[int, float] = {}
    for candidate in with_ranks(candidates, form, uniform, multiple_of):
        assert candidate.rank is not None
        tail = truncation_tail(spectra[candidate.name])
        lost = float(tail[candidate.rank]) / 2
        growth[candidate.layer] = growth.get(candidate.layer, 0.0) + lost
    return [growth.get(layer, math.inf) for layer in range(layers)]


def with_budget(
    candidates: Sequence[Candidate],
    form: Form,
    rank: RankConfig,
    multiple_of: int,
    spectra: Mapping[str, torch.Tensor] | None,
) -> list[Candidate]:
    """The candidates with ranks that spend ``rank.ratio`` over all of them where the loss grows
    least.

    Args:
        spectra: squared singular values of every weight in the metric of the loss. None takes all
            as equal: enough to see whether the budget can hold.

    Raises:
        ValueError: the ratio is too small for the least ranks.
    """
    assert rank.ratio is not None

    def spectrum(candidate: Candidate) -> torch.Tensor:
        return torch.ones(min(candidate.shape)) if spectra is None else spectra[candidate.name]

    def curve(candidate: Candidate) -> RankCurve:
        (m, n), bias = candidate.shape, candidate.bias
        return RankCurve(
            loss=truncation_tail(spectrum(candidate)),
            factored=lambda rank: form.sizes.parameters(m, n, rank, bias=bias),
            dense=dense_parameters(m, n, bias=bias),
            limit=form.sizes.break_even_rank(m, n, bias=bias),
        )

    curves = [curve(c) for c in candidates]
    ranks = allocate_ranks(curves, rank.ratio, multiple_of=multiple_of, least=rank.least)
    return [replace(c, rank=chosen) for c, chosen in zip(candidates, ranks, strict=True)]
