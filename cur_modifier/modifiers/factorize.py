"""One weight into one set of factors: the choices of a recipe applied to linear algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cur_modifier.linalg import (
    CUR,
    Form,
    RowID,
    Score,
    Selection,
    cur,
    gram_norm,
    interpolative,
    interpolative_aligned,
    score,
    select_rows,
    select_rows_and_columns,
    singular_values,
)
from cur_modifier.modifiers.config import Fit

__all__ = [
    "Recipe",
    "factorize",
    "factorize_aligned",
    "fitted_gram",
    "quantization_noise",
    "relative_error",
    "weighted_spectrum",
]


@dataclass(frozen=True)
class Recipe:
    """How a weight becomes factors. ``selection`` None is a row ID of the optimal approximation;
    only that and a greedy selection go without scores."""

    form: Form
    scores: Score | None
    selection: Selection | None
    fit: Fit

    @property
    def needs_activations(self) -> bool:
        """Whether any part looks at calibration data."""
        return self.fit.needs_activations or (
            self.scores is not None and self.scores.needs_activations
        )


def quantization_noise(bits: int | None) -> float:
    """Relative error power of rounding weights to ``bits``, 0 for None.

    A symmetric grid over ±2.5 standard deviations has steps of ``5σ/2^bits``, and a uniform error
    has a twelfth of the step's square: ``25/12 · 4^-bits``, 0.8 % at 4 bits.
    """
    return 0.0 if bits is None else 25 / 12 * 4.0**-bits


def factorize(
    recipe: Recipe,
    W: torch.Tensor,
    second_moment: torch.Tensor | None,
    rank: int,
    *,
    seed: int = 0,
    noise: float = 0.0,
    outputs: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    blocks: Sequence[tuple[int, int]] | None = None,
) -> CUR | RowID:
    """Factors of ``W (m, n)`` at ``rank``, given ``E[x xᵀ] (n, n)`` where the recipe needs it.

    Args:
        outputs: metric ``(m, m)`` or ``(m,)`` of the outputs, for fit ``loss``.
        target: ``(m, n)``, what the factors approximate in place of ``W``; real rows and columns
            are those of ``W`` all the same.
        noise: relative error power that a later stage will bring to the skeleton of a row ID. CUR
            takes no heed of it: on SmolLM2 a core fitted to the noise gained nothing.
        blocks: where ``W`` stacks weights that are to share a skeleton, the outputs of each and how
            many of them the skeleton gives directly; for a recipe without selection.

    Raises:
        ValueError: as the routines of :mod:`cur_modifier.linalg`.
    """
    W = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    gram = fitted_gram(recipe.fit, second_moment)
    if recipe.selection is None:
        wanted = W if target is None else target.to(W)
        return interpolative(wanted, rank, gram, noise=noise, outputs=outputs, blocks=blocks)
    # A greedy selection looks at the weight itself, in the norm of the fit.
    scored = W if recipe.scores is None else score(recipe.scores, W, second_moment)
    if recipe.form is Form.ID:
        rows = select_rows(recipe.selection, scored, rank, seed=seed, gram=gram, outputs=outputs)
        return interpolative(W, rank, gram, rows=rows, noise=noise, target=target)
    rows, columns = select_rows_and_columns(
        recipe.selection, scored, rank, seed=seed, gram=gram, outputs=outputs
    )
    return cur(W, rows, columns, gram, outputs=outputs, target=target)


def factorize_aligned(
    recipe: Recipe,
    weights: Sequence[torch.Tensor],
    second_moment: torch.Tensor | None,
    ranks: Sequence[int],
    *,
    noise: Sequence[float],
    outputs: Sequence[torch.Tensor | None],
    targets: Sequence[torch.Tensor | None],
) -> list[RowID]:
    """Row IDs, without selection, of weights that read the same inputs: the outputs of all in one
    order where that is safe. Arguments as :func:`factorize` has them, one for each weight."""
    wide = [W.detach().to(torch.promote_types(W.dtype, torch.float32)) for W in weights]
    wanted = [
        W if target is None else target.to(W) for W, target in zip(wide, targets, strict=True)
    ]
    gram = fitted_gram(recipe.fit, second_moment)
    return interpolative_aligned(wanted, ranks, gram, noise=noise, outputs=outputs)


def fitted_gram(fit: Fit, second_moment: torch.Tensor | None) -> torch.Tensor | None:
    """The ``gram`` argument of the decompositions for a norm of fit."""
    if fit is Fit.WEIGHT or second_moment is None:
        return None
    return second_moment.diagonal() if fit is Fit.DIAG else second_moment


def relative_error(W: torch.Tensor, dense: torch.Tensor, gram: torch.Tensor | None) -> float:
    """``‖(W − Ŵ) N‖_F / ‖W N‖_F`` in the norm of the fit; 0 for a zero weight."""
    whole = gram_norm(W, gram)
    return gram_norm(W - dense, gram) / whole if whole else 0.0


def weighted_spectrum(W: torch.Tensor, mean_square: torch.Tensor | None) -> torch.Tensor:
    """Singular values ``(min(m, n),)`` of ``W diag(E[x²])^{1/2}``, or of ``W``; descending."""
    scale = 1.0 if mean_square is None else mean_square.double().sqrt().to(W.device)
    return singular_values(W.detach().double() * scale)
