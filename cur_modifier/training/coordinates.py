"""Coordinates in which the loss of a factor is round."""

from __future__ import annotations

import math

import torch

__all__ = ["Coordinates", "inverse_root"]


class Coordinates:
    """A factor ``F = F0 + A D B`` whose change ``D`` is trained where the loss is round.

    A step along an entry of ``F`` changes the layer's output by as much as the factors around ``F``
    and its inputs happen to be large there, which differs by orders of magnitude. In ``D`` each
    entry changes the output ``L F z`` by the same mean square: ``A = (LᵀL)^{-1/2}`` and
    ``B = E[z zᵀ]^{-1/2}``. (The Kronecker-factored preconditioner of Martens and Grosse 2015, which
    here is exact for the layer's own error and fixed, since everything around ``F`` is frozen.)

    Cost: two eigendecompositions at start; four products of the size of ``F`` a step.

    Args:
        start: ``F0 (p, q)``, kept in float32.
        output: ``LᵀL (p, p)``, or None for the identity.
        inputs: ``E[z zᵀ] (q, q)``, likewise.

    Attributes:
        D: ``(p, q)``, zero at first; what an optimizer trains.
        value: ``F (p, q)``, float32, a leaf that collects gradients.
        unit: what a change of every entry of ``D`` by 1 must be multiplied with to be as large as
            ``F0`` itself, in the mean square of the layer's output.
    """

    def __init__(
        self, start: torch.Tensor, output: torch.Tensor | None, inputs: torch.Tensor | None
    ) -> None:
        self.start = start.detach().float().clone()
        self.left = None if output is None else inverse_root(output)
        self.right = None if inputs is None else inverse_root(inputs)
        F0 = self.start.double()
        weighted = F0 if output is None else output.double() @ F0
        energy = float((weighted * (F0 if inputs is None else F0 @ inputs.double())).sum())
        self.unit = math.sqrt(max(energy, 0.0) / F0.numel())
        self.D = torch.zeros_like(self.start)
        self.value = self.start.clone().requires_grad_()

    def pull_gradient(self) -> None:
        """Turn the gradient of ``value`` into that of ``D``, and clear it."""
        gradient = self.value.grad
        if gradient is None:  # an expert that no token of the batch went to
            gradient = torch.zeros_like(self.value)
        if self.left is not None:
            gradient = self.left @ gradient
        self.D.grad = gradient if self.right is None else gradient @ self.right
        self.value.grad = None

    def at(self, D: torch.Tensor) -> torch.Tensor:
        """``F0 + A D B``; exactly ``F0`` for zero."""
        change = D if self.left is None else self.left @ D
        return self.start + (change if self.right is None else change @ self.right)

    def push(self) -> None:
        """Bring ``value`` up to date with ``D``."""
        with torch.no_grad():
            self.value.copy_(self.at(self.D))


def inverse_root(moment: torch.Tensor, damping: float = 1e-3) -> torch.Tensor:
    """``(M + δ mean(λ) I)^{-1/2}`` of a positive semidefinite ``M``, float32; I where ``M`` is 0.

    The damping bounds what a direction that the data hardly show is amplified by.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    mean = float(values.clamp_min(0).mean())
    if not mean > 0:
        return torch.eye(len(values), device=moment.device)
    roots = (values.clamp_min(0) + damping * mean).rsqrt()
    return ((vectors * roots) @ vectors.T).float()
