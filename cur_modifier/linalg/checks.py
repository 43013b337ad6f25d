"""Guards that every routine of this package shares."""

from __future__ import annotations

import torch

__all__ = [
    "at_least_float32",
    "prepared",
    "require_finite",
    "require_gram",
    "require_indices",
    "require_matrix",
    "require_rank",
]


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or in float32 where it is narrower: no factorization runs in half."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def require_matrix(tensor: torch.Tensor, name: str) -> None:
    """Refuse anything but a non-empty real 2-D floating-point tensor.

    Raises:
        ValueError: ``tensor`` is not 2-D, is empty, or is not floating point.
    """
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected a non-empty matrix (rows, columns)."
        )
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; expected a real floating-point dtype. "
            "Convert it first, e.g. with `.float()`."
        )


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Refuse NaN and infinity: every factorization would spread them over all its factors.

    Raises:
        ValueError: with the number of offending entries.
    """
    # The extremes are NaN or infinite as soon as one entry is, and need no second tensor.
    if tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    raise ValueError(
        f"{name} contains NaN or infinity in {bad} of {tensor.numel()} entries. "
        "Repair the checkpoint or the calibration data before factoring."
    )


def require_gram(gram: torch.Tensor, features: int) -> None:
    """Refuse anything but a finite ``(n, n)`` or ``(n,)`` for ``n`` input features.

    Raises:
        ValueError: the shape or an entry is wrong.
    """
    if gram.shape not in {(features, features), (features,)}:
        raise ValueError(
            f"the Gram matrix has shape {tuple(gram.shape)}; expected "
            f"({features}, {features}) or its diagonal ({features},): one entry an input feature."
        )
    require_finite(gram, "the Gram matrix")


def require_indices(indices: torch.Tensor, length: int, name: str) -> None:
    """Refuse an index outside ``0..length − 1``; negative ones do not count from the end.

    Raises:
        ValueError: naming the first offending index.
    """
    outside = indices[(indices < 0) | (indices >= length)]
    if outside.numel():
        raise ValueError(
            f"{name} contain index {int(outside[0])}, outside 0..{length - 1}. "
            "Select them on the matrix that is factored."
        )


def require_rank(rank: int, limit: int, what: str) -> None:
    """Refuse a rank outside ``1..limit``.

    Raises:
        ValueError: naming the rank and the range.
    """
    if not 1 <= rank <= limit:
        raise ValueError(
            f"rank {rank} is outside 1..{limit} for {what}. Choose a rank in that range."
        )


def prepared(W: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    """A weight that decompositions can start from, float32 at least.

    Raises:
        ValueError: ``W`` or ``gram`` is not finite, or they do not fit.
    """
    require_matrix(W, "the weight")
    require_finite(W, "the weight")
    if gram is not None:
        require_gram(gram, W.shape[1])
    return at_least_float32(W.detach())
