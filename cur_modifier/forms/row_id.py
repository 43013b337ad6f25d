"""Row interpolative decompositions: outputs computed, and outputs interpolated from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .base import FactoredLinear, Write, copy_tensor, unpacked
from .form import Form
from .latest import LatestProduct, state_of
from .sizes import Sized

__all__ = ["FORM", "RowIDLinear", "load_shared", "shared_skeleton"]


class RowIDLinear(FactoredLinear):
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
    free_factor = "id_t"
    id_s: nn.Linear
    id_t: nn.Linear | None
    order: torch.Tensor
    direct_outputs: int

    def make_factors(
        self,
        bias: bool,
        *,
        direct_outputs: int | None = None,
        leader: RowIDLinear | None = None,
        **kwargs: Any,
    ) -> None:
        n, m, r = self.in_features, self.out_features, self.rank
        self.direct_outputs = r if direct_outputs is None else direct_outputs
        # As with the stand-in, a list hides the leader: it is to be found once in the model.
        self._leader = [] if leader is None else [leader]
        self._check_sizes(shared=direct_outputs is not None)
        if leader is None:
            self.id_s = nn.Linear(n, r, bias=False, **kwargs)
            self._latest = LatestProduct()
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
    def leader(self) -> RowIDLinear | None:
        """The layer whose skeleton this one uses; None where it has its own."""
        return self._leader[0] if self._leader else None

    @property
    def _owner(self) -> RowIDLinear:
        return self._leader[0] if self._leader else self

    @property
    def _first_factor(self) -> nn.Linear:
        return self._owner.id_s

    def load_factors(
        self, factors: Any, bias: torch.Tensor | None = None, *, write: Write = copy_tensor
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

    def _check_factors(self, factors: Any) -> None:
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
        state = state_of(self.id_s, x) if self._sharing > 1 else None
        if state is None:
            return self.id_s(x)
        z = self._latest.take(x, state, place)
        if z is None:
            z = self.id_s(x)
            # Asked again: the first call of a quantized Linear unpacks its weight.
            waiting = set(range(self._sharing)) - {place}
            self._latest.keep(x, state_of(self.id_s, x), z, waiting)
        return z

    def dense_weight(self) -> torch.Tensor:
        S = unpacked(self._owner.id_s, "id_s")
        stacked = S if self.id_t is None else torch.cat([S, self._weight("id_t") @ S])
        return stacked.index_select(0, self.order)

    def effective_bias(self) -> torch.Tensor | None:
        return self.bias

    def extra_repr(self) -> str:
        shared = self.leader is not None or self._sharing > 1
        return super().extra_repr() + (f", direct_outputs={self.direct_outputs}" if shared else "")

    def variant(self, names: Mapping[FactoredLinear, str]) -> dict[str, Any]:
        leader = self.leader
        if leader is not None and leader not in names:
            raise ValueError(
                f"{names[self]} uses the skeleton of a layer that was taken out of the model, so "
                "it can't be saved. Replace this one, too, e.g. by its to_dense()."
            )
        if leader is None and self._sharing == 1 and self.direct_outputs == self.rank:
            return {}
        shared = {} if leader is None else {"shared_skeleton": names[leader]}
        return shared | {"direct_outputs": self.direct_outputs}

    def output_metric(self, factor: str, H: torch.Tensor) -> torch.Tensor | None:
        r, order = self.rank, self.order.long()
        T = None if self.id_t is None else self._wide("id_t")
        # The metric of the entries [z; T z], of which the outputs are a choice.
        stacked = H.new_zeros(r + (0 if T is None else len(T)))
        if H.ndim == 1:
            if factor == "id_t":
                return None
            stacked[order] = H
            inner = torch.diag(stacked[:r])
            return inner if T is None else inner + T.mT @ (stacked[r:, None] * T)
        whole = torch.diag(stacked)
        whole[order[:, None], order] = H
        if factor == "id_t":
            return whole[r:, r:]
        if T is None:
            return whole[:r, :r]
        side = whole[:r, r:] @ T
        return whole[:r, :r] + side + side.mT + T.mT @ whole[r:, r:] @ T

    def input_moment(self, factor: str, G: torch.Tensor) -> torch.Tensor:
        if factor == "id_s":
            return G
        S = self._owner.id_s.weight.detach().double()
        return S @ G @ S.mT

    @property
    def output_sequence(self) -> torch.Tensor | None:
        """Skeleton first. None where the skeleton is shared: then it is no matter of this layer
        alone."""
        return None if self.direct_outputs != self.rank else self.order.long().argsort()

    def reorder_outputs(self, sequence: torch.Tensor, *, write: Write = copy_tensor) -> None:
        write(self, "order", self.order[sequence])
        if self.bias is not None:
            write(self, "bias", self.bias.detach()[sequence])

    def reorder_inputs(self, sequence: torch.Tensor, *, write: Write = copy_tensor) -> None:
        if self.leader is None:  # or the leader's skeleton is the one that reads
            super().reorder_inputs(sequence, write=write)


def shared_skeleton(
    in_features: int,
    out_features: Sequence[int],
    rank: int,
    direct_outputs: Sequence[int],
    *,
    bias: Sequence[bool] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[RowIDLinear]:
    """Layers that share one skeleton, with empty factors; the first one is the leader.

    Args:
        out_features, direct_outputs: ``m_k`` and ``c_k`` of every layer.
        rank: ``r`` of the skeleton, which may exceed an ``m_k``.
        bias: which layers have one; by default none.

    Raises:
        ValueError: lists of different lengths, direct outputs that do not add up to the rank, no
            output left to interpolate, or what :class:`RowIDLinear` refuses.
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
    layers: list[RowIDLinear] = []
    for m, c, has_bias in zip(out_features, direct_outputs, bias, strict=True):
        layer = RowIDLinear(
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
    layers: Sequence[RowIDLinear],
    factors: Sequence[Any],
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


class RowIDForm(Form):
    """``W ≈ P [S; T S]``: a skeleton of outputs, and the others interpolated from it."""

    name = "id"
    layer = RowIDLinear
    expects_noise = True

    def solve_together(self, problems: Sequence[Any]) -> list[Any]:
        if len(problems) == 1:
            return super().solve_together(problems)
        return list(self._algebra().solve_together(problems))

    def of_pair(self, pair: Any) -> Any:
        return self._algebra().row_id_of_pair(pair, in_pairs=True)

    def orders_freely(self, selection: str | None) -> bool:
        """The skeleton of the optimal approximation may be any well-conditioned rows."""
        return selection is None

    def build(
        self, spec: Sized, *, bias: bool, leader: FactoredLinear | None = None, **like: Any
    ) -> RowIDLinear:
        return RowIDLinear(
            spec.in_features,
            spec.out_features,
            spec.rank,
            bias=bias,
            direct_outputs=spec.direct_outputs,
            leader=leader,
            **like,
        )

    def build_shared(
        self,
        in_features: int,
        out_features: Sequence[int],
        rank: int,
        direct_outputs: Sequence[int],
        *,
        bias: Sequence[bool],
        **like: Any,
    ) -> list[RowIDLinear]:
        return shared_skeleton(in_features, out_features, rank, direct_outputs, bias=bias, **like)

    def load(
        self,
        layers: Sequence[Any],
        factors: Any,
        biases: Sequence[torch.Tensor | None],
        *,
        write: Write = copy_tensor,
    ) -> None:
        if len(layers) == 1:
            return super().load(layers, factors, biases, write=write)
        parts = factors.split([layer.out_features for layer in layers])
        load_shared(layers, parts, biases, write=write)


FORM = RowIDForm()
