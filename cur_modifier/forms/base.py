"""What the layers of all forms have in common.

The factors are ordinary ``nn.Linear`` children, so that every other stage of a recipe (GPTQ,
SparseGPT, round-to-nearest) sees them, calibrates them on what really flows through them, and packs
them as it packs any Linear. The containers are not ``nn.Linear`` themselves: a stage that targets
``Linear`` reaches the factors and nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple, Self, TypeGuard

import torch
from torch import nn

from .sizes import FORMS, Shape, Sizes

__all__ = [
    "FactoredLinear",
    "Surroundings",
    "Write",
    "answering_dense",
    "copy_tensor",
    "factored_layers",
    "is_factored",
    "unpacked",
]

Write = Callable[[nn.Module, str, torch.Tensor], None]
"""Stores a tensor under a parameter's or buffer's name. Offloaded modules need their own."""


def copy_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """The plain :data:`Write`: copies in place, keeping device and dtype."""
    with torch.no_grad():
        getattr(module, name).copy_(value)


class Surroundings(NamedTuple):
    """What a layer reads, and what its outputs are worth.

    Attributes:
        inputs: ``G (n, n)``, positive definite.
        outputs: ``H (m, m)``, positive definite, or its diagonal ``(m,)``.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor


class FactoredLinear(nn.Module):
    """A Linear layer stored as a product of small matrices, with a dense stand-in before the fit.

    Attributes:
        in_features, out_features, rank: ``n``, ``m``, ``r``.
        form: name of the form in :data:`~.sizes.FORMS`.
        free_factor: the factor that is fitted, and not taken from the dense weight.
        direct_outputs: outputs that the first factor gives, in a form that has such.
    """

    form: str
    free_factor: str
    direct_outputs: int | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **variant: Any,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        # A one-element list hides the dense layer from `named_modules`: followers must not see it.
        self._stand_in: list[nn.Linear] = []
        self._teacher: list[nn.Linear] = []
        self.make_factors(bias, device=device, dtype=dtype, **variant)

    def make_factors(self, bias: bool, **kwargs: Any) -> None:
        """Make the children and buffers, with ``device`` and ``dtype`` of the factors.

        Raises:
            ValueError: the form has no such rank.
        """
        raise NotImplementedError

    def _check_rank(self, limit: int) -> None:
        if not 1 <= self.rank <= limit:
            raise ValueError(
                f"rank {self.rank} is outside 1..{limit} for a "
                f"{self.out_features}x{self.in_features} layer."
            )

    @classmethod
    def from_factors(
        cls,
        factors: Any,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer holding ``factors`` of its form, on their device and in their dtype unless told
        otherwise."""
        m, n = factors.shape
        like = next(iter(vars(factors).values()))
        layer = cls(
            n,
            m,
            factors.rank,
            bias=bias is not None,
            device=like.device,
            dtype=dtype or like.dtype,
        )
        layer.load_factors(factors, bias)
        return layer

    @property
    def factors(self) -> dict[str, nn.Linear]:
        """The children by name, all of them Linears, in the order in which they are applied."""
        return dict(self.named_children())  # type: ignore[arg-type]

    def stand_in(self, dense: nn.Linear) -> None:
        """Answer with ``dense`` until :meth:`load_factors`: the factors are not fitted yet."""
        self._stand_in = [dense]

    @property
    def dense(self) -> nn.Linear | None:
        """The dense layer that answers for unfitted factors, if any."""
        return self._stand_in[0] if self._stand_in else None

    def keep_dense(self) -> None:
        """Keep the dense stand-in as :attr:`teacher` beyond :meth:`load_factors`.

        It costs the dense layer's memory until :meth:`drop_teacher`.
        """
        self._teacher = self._stand_in

    @property
    def teacher(self) -> nn.Linear | None:
        """The dense layer that was kept to learn from, if any."""
        return self._teacher[0] if self._teacher else None

    def drop_teacher(self) -> None:
        """Let go of the dense layer that :meth:`keep_dense` kept."""
        self._teacher = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., n)`` to ``(..., m)``."""
        if self._stand_in:
            return self._stand_in[0](x)
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The forward pass through the factors."""
        raise NotImplementedError

    def load_factors(
        self, factors: Any, bias: torch.Tensor | None = None, *, write: Write = copy_tensor
    ) -> None:
        """Store ``factors`` of the class's form and stop answering with the dense stand-in."""
        raise NotImplementedError

    def dense_weight(self) -> torch.Tensor:
        """The product of the factors, ``(m, n)``, in float32 or wider."""
        raise NotImplementedError

    def to_dense(self) -> nn.Linear:
        """One ``nn.Linear`` with the product of the factors as its weight.

        Raises:
            ValueError: the factors are packed by a quantized format; run one forward pass of the
                model first, which unpacks them.
        """
        bias = self.effective_bias()
        weight = self.dense_weight()
        like = self._first_factor.weight
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=bias is not None,
            device=like.device,
            dtype=like.dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(weight)
            if bias is not None:
                dense.bias.copy_(bias)
        return dense

    def effective_bias(self) -> torch.Tensor | None:
        """The bias ``(m,)`` in the order of the outputs, or None."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    # -- what the layer is in a checkpoint ------------------------------------------------------

    @property
    def sizes(self) -> Sizes:
        """The shapes of the form."""
        return FORMS[self.form]

    @property
    def stored_parameters(self) -> int:
        """Parameters that are this layer's own in a checkpoint."""
        spec = Shape(self.out_features, self.in_features, self.rank, self.direct_outputs)
        return self.sizes.stored(spec, bias=self.effective_bias() is not None)

    @property
    def leader(self) -> FactoredLinear | None:
        """The layer whose first factor this one uses; None where it has its own."""
        return None

    def variant(self, names: Mapping[FactoredLinear, str]) -> dict[str, Any]:
        """What a ``ModuleSpec`` says of this layer beyond its sizes.

        Args:
            names: of all factored layers of the model.

        Raises:
            ValueError: a layer that this one depends on has no name.
        """
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights, indices and bias by their names in a checkpoint; no scales of quantization."""
        spec = Shape(self.out_features, self.in_features, self.rank)
        names = [f"{name}.weight" for name in self.factors] + list(self.sizes.indices(spec))
        if self.effective_bias() is not None:
            names.append(self.sizes.bias)
        return {name: attrgetter(name)(self) for name in names}

    # -- what is around a factor ``F``, where the layer is ``L F z`` ----------------------------

    def output_metric(self, factor: str, H: torch.Tensor) -> torch.Tensor | None:
        """``LᵀHL (p, p)`` in float64 of a factor ``F (p, q)``; None where it is a diagonal that
        would be large.

        Args:
            H: metric of the layer's outputs, ``(m, m)`` or its diagonal ``(m,)``.
        """
        raise NotImplementedError

    def input_moment(self, factor: str, G: torch.Tensor) -> torch.Tensor:
        """``E[z zᵀ] (q, q)`` in float64 of a factor ``F (p, q)``, for ``G (n, n)`` of the layer's
        inputs."""
        raise NotImplementedError

    def metrics(self, around: Surroundings) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
        """:meth:`output_metric` and :meth:`input_moment` of every factor by name."""
        H, G = around.outputs.double(), around.inputs.double()
        return {
            name: (self.output_metric(name, H), self.input_moment(name, G)) for name in self.factors
        }

    # -- permutations ---------------------------------------------------------------------------

    @property
    def output_sequence(self) -> torch.Tensor | None:
        """The outputs ``(m,)`` in the order in which the layer computes them; None where one is as
        good as another."""
        return None

    def reorder_outputs(self, sequence: torch.Tensor, *, write: Write = copy_tensor) -> None:
        """Make output ``sequence[i]`` the ``i``-th one. Exact."""
        raise NotImplementedError

    def reorder_inputs(self, sequence: torch.Tensor, *, write: Write = copy_tensor) -> None:
        """Read input ``sequence[i]`` at place ``i``. Exact."""
        first = self._first_factor
        write(first, "weight", first.weight.detach()[:, sequence])

    @property
    def _first_factor(self) -> nn.Linear:
        return next(iter(self.factors.values()))

    def _wide(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self.get_submodule(name).weight  # type: ignore[assignment]
        return weight.detach().double()

    def _weight(self, name: str) -> torch.Tensor:
        return unpacked(self.get_submodule(name), name)


def unpacked(factor: nn.Module, name: str) -> torch.Tensor:
    """The weight of a factor in float32 or wider.

    Raises:
        ValueError: it is packed.
    """
    weight = getattr(factor, "weight", None)
    if weight is None:
        raise ValueError(
            f"factor '{name}' holds packed weights, so the dense matrix can't be formed. "
            "Run one forward pass of the model first: compressed-tensors unpacks it then."
        )
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


@contextmanager
def answering_dense(model: nn.Module) -> Iterator[None]:
    """``model`` as it was before factoring: layers with a :attr:`~FactoredLinear.teacher` answer
    with it, whatever their factors are."""
    layers = [m for m in factored_layers(model).values() if m.teacher is not None]
    before = [layer._stand_in for layer in layers]
    for layer in layers:
        layer._stand_in = layer._teacher
    try:
        yield
    finally:
        for layer, stand_in in zip(layers, before, strict=True):
            layer._stand_in = stand_in


def is_factored(module: nn.Module) -> TypeGuard[FactoredLinear]:
    """Whether a module is a factored layer, of whatever form."""
    return isinstance(module, FactoredLinear)


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """The factored layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FactoredLinear)}
