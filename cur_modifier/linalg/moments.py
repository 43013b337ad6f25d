"""Second moments of activations, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cur_modifier.linalg.checks import require_finite

__all__ = ["GramAccumulator", "PairedMoments"]


class GramAccumulator:
    """Streaming estimate of ``G = E[x xᵀ]``.

    Args:
        features: ``n``, the length of ``x``.
        device: where the sum is kept; batches are moved there.
        dtype: of the products and the sum. float32 matches the accuracy of the activations.

    Cost: ``2 n² t`` flops for ``t`` tokens, ``n²`` entries of memory.
    """

    def __init__(
        self,
        features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.features = features
        self.tokens = 0
        self._sum = torch.zeros(features, features, device=device, dtype=dtype)

    def update(self, x: torch.Tensor) -> None:
        """Add the tokens ``x (..., n)``.

        Raises:
            ValueError: the last dimension is not ``n``.
        """
        if x.shape[-1] != self.features:
            raise ValueError(
                f"activations have {x.shape[-1]} features, this Gram matrix has {self.features}."
            )
        rows = x.detach().reshape(-1, self.features).to(self._sum)
        with _products_in(x.dtype):
            self._sum.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the sum is kept."""
        return self._sum.device

    def add(self, other: GramAccumulator) -> None:
        """Add the tokens that another estimate of as many features has seen."""
        self._sum += other._sum.to(self._sum)
        self.tokens += other.tokens

    def second_moment(self) -> torch.Tensor:
        """``G (n, n)``, symmetric, in the accumulator's dtype.

        Raises:
            ValueError: no token was seen, or the activations held NaN or infinity.
        """
        if self.tokens == 0:
            raise ValueError("no token reached this module: its Gram matrix is undefined.")
        gram = self._sum / self.tokens
        require_finite(gram.diagonal(), "the activations' second moment")
        return gram


class PairedMoments:
    """Streaming ``E[x̃ x̃ᵀ]`` and ``E[(x − x̃) x̃ᵀ]`` of one module's inputs in two models.

    ``x`` is what the module reads in the dense model, ``x̃`` what it reads in the compressed one, on
    the same token. Anchoring a factorization to the dense model takes both moments, see
    :func:`cur_modifier.linalg.anchored_target`. The second one is of the difference itself: as a
    difference of moments it would drown in their rounding.

    Args:
        features: ``n``.
        device: where the sums are kept; batches are moved there.

    Cost: ``4 n² t`` flops for ``t`` tokens, ``2 n²`` float32 numbers. Products of half-precision
    inputs run in half precision, and are summed and kept in float32: rounding a moment itself to
    16 bits would make it indefinite where one feature is massive.
    """

    def __init__(self, features: int, *, device: torch.device | str | None = None) -> None:
        self.features = features
        self.tokens = 0
        self._gram = torch.zeros(features, features, device=device)
        self._drift = torch.zeros(features, features, device=device)

    def update(self, compressed: torch.Tensor, dense: torch.Tensor) -> None:
        """Add the tokens ``x̃ (..., n)`` and ``x (..., n)``.

        Raises:
            ValueError: the two differ in shape, or do not have ``n`` features.
        """
        if compressed.shape != dense.shape or compressed.shape[-1] != self.features:
            raise ValueError(
                f"the compressed model's inputs {tuple(compressed.shape)} and the dense model's "
                f"{tuple(dense.shape)} must be the same tokens, of {self.features} features each."
            )
        rows = compressed.detach().reshape(-1, self.features).to(self._gram)
        moved = dense.detach().reshape(-1, self.features).to(self._gram) - rows
        with _products_in(compressed.dtype):
            self._gram.addmm_(rows.T, rows)
            self._drift.addmm_(moved.T, rows)
        self.tokens += rows.shape[0]

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``E[x̃ x̃ᵀ] (n, n)`` and ``E[(x − x̃) x̃ᵀ] (n, n)``, float32.

        Raises:
            ValueError: no token was seen, or the activations held NaN or infinity.
        """
        if self.tokens == 0:
            raise ValueError("no token reached this module: its Gram matrix is undefined.")
        gram, drift = self._gram / self.tokens, self._drift / self.tokens
        require_finite(gram.diagonal(), "the activations' second moment")
        require_finite(drift.diagonal(), "the activations' drift")
        return gram, drift


@contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """Float32 products whose factors are exact in ``dtype`` may be computed in it."""
    before = torch.get_float32_matmul_precision()
    if dtype is torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
