"""What a form must answer; its layers answer the rest."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from .base import FactoredLinear, Write, copy_tensor
from .sizes import FORMS, Sized, Sizes

__all__ = ["Form"]


class Form:
    """One way to store a weight. Stateless: what it says depends on its arguments alone.

    Attributes:
        name: in a recipe and in :data:`~.sizes.FORMS`.
        layer: the class of its layers.
        selects: whether its factors may be made of chosen rows or columns.
        default_selection: how they are chosen where a recipe does not say; None for the optimal
            approximation.
        expects_noise: whether its fit makes use of the noise that a later stage will bring.
    """

    name: str
    layer: type[FactoredLinear]
    selects = True
    default_selection: str | None = None
    expects_noise = False

    @property
    def sizes(self) -> Sizes:
        """Its shapes, parameters and ranks."""
        return FORMS[self.name]

    def solve(self, problem: Any) -> Any:
        """The factors of a ``linalg.Problem``, as the dataclass of the form's module there.

        Raises:
            ValueError: as the decomposition.
        """
        return self._algebra().solve(problem)

    def solve_together(self, problems: Sequence[Any]) -> list[Any]:
        """The factors of weights that read the same inputs."""
        return [self.solve(problem) for problem in problems]

    def of_pair(self, pair: Any) -> Any:
        """The factors that have the product of a ``linalg.LowRank``, exactly.

        Raises:
            ValueError: the form can't hold every product of its rank, or not this one.
        """
        raise ValueError(f"form '{self.name}' can't hold any product of two factors.")

    def orders_freely(self, selection: str | None) -> bool:
        """Whether :meth:`solve_together` can give several weights one order of their outputs."""
        return False

    def build(
        self,
        spec: Sized,
        *,
        bias: bool,
        leader: FactoredLinear | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FactoredLinear:
        """A layer with empty factors.

        Args:
            leader: the layer whose first factor it uses, where ``spec`` says that there is one.

        Raises:
            ValueError: sizes that the form does not have.
        """
        return self.layer(
            spec.in_features, spec.out_features, spec.rank, bias=bias, device=device, dtype=dtype
        )

    def build_shared(
        self,
        in_features: int,
        out_features: Sequence[int],
        rank: int,
        direct_outputs: Sequence[int],
        *,
        bias: Sequence[bool],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Sequence[FactoredLinear]:
        """Layers that share their first factor, the one that has it first.

        Raises:
            ValueError: the form shares nothing.
        """
        raise ValueError(f"layers of form '{self.name}' share no factor.")

    def load(
        self,
        layers: Sequence[FactoredLinear],
        factors: Any,
        biases: Sequence[torch.Tensor | None],
        *,
        write: Write = copy_tensor,
    ) -> None:
        """Store what :meth:`solve` found: of one layer, or of the stacked weight of several that
        share a factor."""
        [layer], [bias] = layers, biases
        layer.load_factors(factors, bias, write=write)

    def _algebra(self) -> Any:
        # By name, since a checkpoint ships this file without the algebra, which no reader needs.
        return import_module(f"cur_modifier.linalg.{self.sizes.module}")
