"""Linear layers stored as products of small matrices.

The factors are ordinary ``nn.Linear`` children, so that every other stage of a recipe (GPTQ,
SparseGPT, round-to-nearest) sees them, calibrates them on what really flows through them, and packs
them as it packs any Linear. The containers are not ``nn.Linear`` themselves: a stage that targets
``Linear`` reaches the factors and nothing twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

__all__ = [
    "FACTORED_CLASSES",
    "CURLinear",
    "FactoredLinear",
    "InterpolativeLinear",
    "answering_dense",
    "load_shared",
    "shared_skeleton",
]

Write = Callable[[nn.Module, str, torch.Tensor], None]
"""Stores a tensor under a parameter's or buffer's name. Offloaded modules need their own."""


def copy_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """The plain :data:`Write`: copies in place, keeping device and dtype."""
    with torch.no_grad():
        getattr(module, name).copy_(value)


class FactoredLinear(nn.Module):
    """What both forms share: sizes, the way back to a dense layer, and a stand-in before the fit.

    Attributes:
        in_features, out_features, rank: ``n``, ``m``, ``r``.
        form: the storage form, "cur" or "id".
        factor_names: names of the form's factors, in the order they are applied.
        free_factor: the one among them that is fitted, and not taken from the dense weight.
    """

    form: str
    factor_names: tuple[str, ...]
    free_factor: str

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
        factors: CUR | RowID,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer holding ``factors``, on their device and in their dtype unless told otherwise."""
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
        """The ``nn.Linear`` children by name."""
        children = dict(self.named_children())
        return {name: children[name] for name in self.factor_names if name in children}  # type: ignore[misc]

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

    @property
    def _first_factor(self) -> nn.Linear:
        return next(iter(self.factors.values()))

    def _weight(self, name: str) -> torch.Tensor:
        return _unpacked(self.get_submodule(name), name)


def _unpacked(factor: nn.Module, name: str) -> torch.Tensor:
    weight = getattr(factor, "weight", None)
    if weight is None:
        raise ValueError(
            f"factor '{name}' holds packed weights, so the dense matrix can't be formed. "
            "Run one forward pass of the model first: compressed-tensors unpacks it then."
        )
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


class CURLinear(FactoredLinear):
    """``y = C (U (R x)) + b`` with real columns ``C`` and real rows ``R`` of the dense weight.

    Children: ``cur_r`` ``(r, n)``, ``cur_u`` ``(r, r)``, ``cur_c`` ``(m, r)``, which carries the
    bias. Buffers ``rows`` and ``columns`` ``(r,)`` int32 say which rows and columns they are.
    """

    form = "cur"
    factor_names = ("cur_r", "cur_u", "cur_c")
    free_factor = "cur_u"
    rows: torch.Tensor
    columns: torch.Tensor

    def make_factors(self, bias: bool, **kwargs: Any) -> None:
        n, m, r = self.in_features, self.out_features, self.rank
        self._check_rank(min(m, n))
        self.cur_r = nn.Linear(n, r, bias=False, **kwargs)
        self.cur_u = nn.Linear(r, r, bias=False, **kwargs)
        self.cur_c = nn.Linear(r, m, bias=bias, **kwargs)
        for name in ("rows", "columns"):
            self.register_buffer(name, torch.zeros(r, dtype=torch.int32, device=kwargs["device"]))

    def load_factors(
        self, factors: CUR, bias: torch.Tensor | None = None, *, write: Write = copy_tensor
    ) -> None:
        write(self.cur_r, "weight", factors.R)
        write(self.cur_u, "weight", factors.U)
        write(self.cur_c, "weight", factors.C)
        write(self, "rows", factors.rows)
        write(self, "columns", factors.columns)
        if bias is not None:
            write(self.cur_c, "bias", bias)
        self._stand_in = []

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.cur_c(self.cur_u(self.cur_r(x)))

    def dense_weight(self) -> torch.Tensor:
        return self._weight("cur_c") @ (self._weight("cur_u") @ self._weight("cur_r"))

    def effective_bias(self) -> torch.Tensor | None:
        return self.cur_c.bias


class InterpolativeLinear(FactoredLinear):
    """Row ID: ``z = S x``, ``y = P [z; T z] + b``.

    Children: ``id_s`` ``(r, n)`` and ``id_t`` ``(m − c, r)``, where ``c`` outputs are entries of
    ``z``. Buffer ``order`` ``(m,)`` int32: output ``i`` is entry ``order[i]`` of ``[z; T z]``. The
    bias is the container's, added after ordering, since ``T`` must act on ``z`` without it.

    **Shared skeleton.** Layers that read the same input may share ``S``. One of them, the leader,
    has it; the others have no ``id_s``, and ask the leader for ``z``, which is computed once for
    all of them (under autograd once for each). Together their direct outputs are the ``r`` entries
    of ``z``; a layer may have none of them (``c = 0``), and one with ``c = m`` has no ``id_t``.
    :func:`shared_skeleton` makes such layers.

    Args:
        direct_outputs: ``c``. By default the rank: the skeleton is not shared.
        leader: the layer whose ``S`` this one uses. It is no child of this one.

    Raises:
        ValueError: a rank or number of direct outputs that the layer can't have, or a leader of
            another rank or input, or one that has no skeleton itself.
    """

    form = "id"
    factor_names = ("id_s", "id_t")
    free_factor = "id_t"
    id_s: nn.Linear
    id_t: nn.Linear | None
    order: torch.Tensor

    def make_factors(
        self,
        bias: bool,
        *,
        direct_outputs: int | None = None,
        leader: InterpolativeLinear | None = None,
        **kwargs: Any,
    ) -> None:
        n, m, r = self.in_features, self.out_features, self.rank
        self.direct_outputs = r if direct_outputs is None else direct_outputs
        # As with the stand-in, a list hides the leader: it is to be found once in the model.
        self._leader = [] if leader is None else [leader]
        self._check_sizes(shared=direct_outputs is not None)
        if leader is None:
            self.id_s = nn.Linear(n, r, bias=False, **kwargs)
            self._latest = _LatestSkeleton()
        rest = m - self.direct_outputs
        self.id_t = nn.Linear(r, rest, bias=False, **kwargs) if rest else None
        self.bias = nn.Parameter(torch.zeros(m, **kwargs)) if bias else None
        self.register_buffer("order", torch.zeros(m, dtype=torch.int32, device=kwargs["device"]))
        self._sharing = 1  # layers that use this one's skeleton
        self._place = 0  # this one's among them
        if leader is not None:
            self._place = leader._sharing
            leader._sharing += 1

    def _check_sizes(self, *, shared: bool) -> None:
        n, m, r, c = self.in_features, self.out_features, self.rank, self.direct_outputs
        leader = self.leader
        self._check_rank(n if shared else min(m, n))
        if r == m and not shared:
            raise ValueError(
                f"rank {r} leaves no output to interpolate in a {m}x{n} layer: a row ID needs "
                "rank < out_features. Leave the layer dense instead."
            )
        if not 0 <= c <= min(m, r):
            raise ValueError(
                f"{c} direct outputs are outside 0..{min(m, r)} for a {m}x{n} layer at rank {r}."
            )
        if leader is None:
            return
        if leader.leader is not None:
            raise ValueError(
                "the leader uses the skeleton of another layer itself. Name that one as leader."
            )
        if (leader.in_features, leader.rank) != (n, r):
            raise ValueError(
                f"the leader has {leader.in_features} inputs and rank {leader.rank}, this layer "
                f"{n} and {r}. Layers that share a skeleton have equally many of both."
            )

    @property
    def leader(self) -> InterpolativeLinear | None:
        """The layer whose skeleton this one uses; None where it has its own."""
        return self._leader[0] if self._leader else None

    @property
    def _owner(self) -> InterpolativeLinear:
        return self._leader[0] if self._leader else self

    @property
    def _first_factor(self) -> nn.Linear:
        return self._owner.id_s

    def load_factors(
        self, factors: RowID, bias: torch.Tensor | None = None, *, write: Write = copy_tensor
    ) -> None:
        """As the base class. Where the skeleton is shared, ``S`` is the leader's to store.

        Raises:
            ValueError: factors of other sizes, or a leader that has no fitted factors yet.
        """
        self._check_factors(factors)
        leader = self.leader
        if leader is None:
            write(self.id_s, "weight", factors.S)
        elif leader.dense is not None:
            raise ValueError(
                "the leader, whose skeleton this layer uses, has no fitted factors yet. Load them "
                "first, or all at once with load_shared."
            )
        if self.id_t is not None:
            write(self.id_t, "weight", factors.T)
        write(self, "order", factors.order)
        if bias is not None:
            write(self, "bias", bias)
        self._stand_in = []
        self._owner._latest.forget()

    def _check_factors(self, factors: RowID) -> None:
        given = (*factors.shape, factors.rank, factors.direct_outputs)
        wanted = (self.out_features, self.in_features, self.rank, self.direct_outputs)
        if given != wanted:
            names = "(out_features, in_features, rank, direct_outputs)"
            raise ValueError(
                f"the factors have {names} = {given}, the layer {wanted}. Make the layer for these "
                "factors; shared_skeleton makes layers that share a skeleton."
            )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        z = self._owner._skeleton_outputs(x, self._place)
        entries = z if self.id_t is None else torch.cat([z, self.id_t(z)], dim=-1)
        y = entries.index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def _skeleton_outputs(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """``z (..., r)`` for the layer at ``place`` among those that share the skeleton."""
        state = _state(self.id_s, x) if self._sharing > 1 else None
        if state is None:
            return self.id_s(x)
        z = self._latest.take(x, state, place)
        if z is None:
            z = self.id_s(x)
            # Asked again: the first call of a quantized Linear unpacks its weight.
            waiting = set(range(self._sharing)) - {place}
            self._latest.keep(x, _state(self.id_s, x), z, waiting)
        return z

    def dense_weight(self) -> torch.Tensor:
        S = _unpacked(self._owner.id_s, "id_s")
        stacked = S if self.id_t is None else torch.cat([S, self._weight("id_t") @ S])
        return stacked.index_select(0, self.order)

    def effective_bias(self) -> torch.Tensor | None:
        return self.bias

    def extra_repr(self) -> str:
        shared = self.leader is not None or self._sharing > 1
        return super().extra_repr() + (f", direct_outputs={self.direct_outputs}" if shared else "")


class _LatestSkeleton:
    """``z`` of the latest input, for the layers of a shared skeleton that have not had it yet.

    Each layer gets it once; it is gone when all have, when the input is, or when another comes. So
    a layer that is never called keeps nothing alive, and a second pass over the same input starts
    anew. Copies and pickles of a model hold none.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._x: weakref.ref[torch.Tensor] | None = None
        self._z: torch.Tensor | None = None
        self._state: object = None
        self._waiting: set[int] = set()

    def keep(self, x: torch.Tensor, state: object, z: torch.Tensor, waiting: set[int]) -> None:
        self.forget()
        if state is not None:
            self._x = weakref.ref(x, lambda _: self.forget())
            self._z, self._state, self._waiting = z, state, waiting

    def take(self, x: torch.Tensor, state: object, place: int) -> torch.Tensor | None:
        if self._x is None or self._x() is not x or self._state != state:
            return None
        if place not in self._waiting:
            return None
        z = self._z
        self._waiting.discard(place)
        if not self._waiting:
            self.forget()
        return z

    def __reduce__(self) -> tuple[type[_LatestSkeleton], tuple[()]]:
        return _LatestSkeleton, ()


def _state(linear: nn.Linear, x: torch.Tensor) -> object:
    """Changes whenever ``linear(x)`` may; None where that can't be told, so nothing may be kept.

    Autograd's graphs are never kept: a backward pass through one layer would free what another
    needs. Compilers see for themselves that two layers compute the same. What is written in place
    through ``.data`` goes unseen, as it does in autograd.
    """
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return None
    tensors = [x]
    for module in linear.modules():
        for held in (module._parameters, module._buffers):
            # compressed-tensors moves an offloaded tensor when it is looked up by its name.
            stored = held if type(held) is dict else getattr(held, "offloaded_values", None)
            if stored is None:
                return None
            tensors += [t for t in stored.values() if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if any(t.is_meta for t in tensors) and not x.is_meta:  # they are elsewhere, on a disk
        return None
    try:
        marks = [(id(t), t._version, t.data_ptr(), t.dtype) for t in tensors]
    except RuntimeError:  # inference mode counts no changes; under vmap there is no storage
        return None
    kind = x.device.type
    lowered = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    precision = torch.get_autocast_dtype(kind) if lowered else None
    return precision, marks


@contextmanager
def answering_dense(model: nn.Module) -> Iterator[None]:
    """``model`` as it was before factoring: layers with a :attr:`~FactoredLinear.teacher` answer
    with it, whatever their factors are."""
    layers = [m for m in model.modules() if isinstance(m, FactoredLinear) and m.teacher is not None]
    before = [layer._stand_in for layer in layers]
    for layer in layers:
        layer._stand_in = layer._teacher
    try:
        yield
    finally:
        for layer, stand_in in zip(layers, before, strict=True):
            layer._stand_in = stand_in


def shared_skeleton(
    in_features: int,
    out_features: Sequence[int],
    rank: int,
    direct_outputs: Sequence[int],
    *,
    bias: Sequence[bool] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[InterpolativeLinear]:
    """Layers that share one skeleton, with empty factors; the first one is the leader.

    Args:
        out_features, direct_outputs: ``m_k`` and ``c_k`` of every layer.
        rank: ``r`` of the skeleton, which may exceed an ``m_k``.
        bias: which layers have one; by default none.

    Raises:
        ValueError: lists of different lengths, direct outputs that do not add up to the rank, no
            output left to interpolate, or what :class:`InterpolativeLinear` refuses.
    """
    bias = [False] * len(out_features) if bias is None else bias
    if not out_features or not len(out_features) == len(direct_outputs) == len(bias):
        raise ValueError(
            f"got {len(out_features)} out_features, {len(direct_outputs)} direct_outputs and "
            f"{len(bias)} bias; every layer needs one of each."
        )
    if sum(direct_outputs) != rank:
        raise ValueError(
            f"direct outputs {list(direct_outputs)} add up to {sum(direct_outputs)}, not to the "
            f"rank {rank}: every entry of the skeleton is an output of exactly one layer."
        )
    if rank == sum(out_features):
        raise ValueError(
            f"rank {rank} leaves none of the {rank} outputs to interpolate. Lower the rank, or "
            "leave the layers dense."
        )
    layers: list[InterpolativeLinear] = []
    for m, c, has_bias in zip(out_features, direct_outputs, bias, strict=True):
        layer = InterpolativeLinear(
            in_features,
            m,
            rank,
            direct_outputs=c,
            leader=layers[0] if layers else None,
            bias=has_bias,
            device=device,
            dtype=dtype,
        )
        layers.append(layer)
    return layers


def load_shared(
    layers: Sequence[InterpolativeLinear],
    factors: Sequence[RowID],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    write: Write = copy_tensor,
) -> None:
    """Load the parts of a joint row ID into the layers that share a skeleton, leader first.

    ``factors`` are what ``linalg.split_rows`` returns, in the order of the layers. Nothing is
    written unless all of it fits.

    Raises:
        ValueError: lists of different lengths, layers that are not those of one skeleton, factors
            that do not share one ``S``, or that are of other sizes.
    """
    biases = [None] * len(layers) if biases is None else biases
    if not layers or not len(layers) == len(factors) == len(biases):
        raise ValueError(
            f"got {len(layers)} layers, {len(factors)} factors and {len(biases)} biases; every "
            "layer needs one of each."
        )
    first, *others = layers
    if first.leader is not None or any(layer.leader is not first for layer in others):
        raise ValueError(
            "the layers do not share the first one's skeleton. Give the layers that one call of "
            "shared_skeleton made, in its order."
        )
    S = factors[0].S
    if any(part.S is not S and not torch.equal(part.S, S) for part in factors):
        raise ValueError(
            "the factors have different skeletons, and the layers store one. Split one row ID of "
            "the stacked weights with linalg.split_rows."
        )
    for layer, part in zip(layers, factors, strict=True):
        layer._check_factors(part)
    for layer, part, bias in zip(layers, factors, biases, strict=True):
        layer.load_factors(part, bias, write=write)


FACTORED_CLASSES: dict[str, type[CURLinear] | type[InterpolativeLinear]] = {
    "cur": CURLinear,
    "id": InterpolativeLinear,
}
