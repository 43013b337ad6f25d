"""What a stage did to each module, as rows, totals and a printed table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from compressed_tensors.offload import disable_onloading
from torch import nn

__all__ = [
    "ModuleRecord",
    "Refinement",
    "Totals",
    "format_table",
    "parameter_bytes",
    "parameter_count",
    "span",
    "summarize",
]


@dataclass
class ModuleRecord:
    """One module. Errors are relative: ``‖(W − Ŵ) N‖_F / ‖W N‖_F`` in the norm of the fit.

    Where modules share a skeleton, ``direct_outputs`` of its rows are this module's, and count in
    its ``parameters_after``; ``shared_skeleton`` names the module that holds it, in the others.
    """

    name: str
    layer: int
    form: str
    out_features: int
    in_features: int
    parameters_before: int
    rank: int | None = None
    direct_outputs: int | None = None
    shared_skeleton: str | None = None
    parameters_after: int | None = None
    relative_error: float | None = None
    max_factor_entry: float | None = None
    expected_noise: float = 0.0
    tokens: int | None = None
    seconds: float | None = None
    losses: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """A flat row; the losses of later stages as one column a factor."""
        row = asdict(self)
        for factor, loss in row.pop("losses").items():
            row[f"loss.{factor}"] = loss
        return row


@dataclass
class Refinement:
    """What training one decoder layer did.

    Attributes:
        before, after: held-out loss of the fit, and of what was kept.
        train: loss of every step.
        kept: whether trained factors were kept.
    """

    before: float
    after: float
    train: list[float] = field(default_factory=list)
    kept: bool = True


@dataclass(frozen=True)
class Totals:
    """Sums over the factored modules and the whole model."""

    modules: int
    targets_before: int
    targets_after: int
    model_before: int
    model_after: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Parameters stored after ÷ before, over the modules that were to be factored."""
        return self.targets_after / self.targets_before

    def metrics(self) -> dict[str, float]:
        """Flat metrics with their units in the names."""
        return {
            "modules_factored": self.modules,
            "parameters_targets_before": self.targets_before,
            "parameters_targets_after": self.targets_after,
            "ratio_targets": self.ratio,
            "parameters_model_before": self.model_before,
            "parameters_model_after": self.model_after,
            "ratio_model": self.model_after / self.model_before,
            "factoring_seconds": self.seconds,
        }


def summarize(records: Sequence[ModuleRecord], model_before: int) -> Totals:
    """Totals of a finished stage. A module that stayed dense counts its dense parameters."""
    before = sum(r.parameters_before for r in records)
    after = sum(
        r.parameters_before if r.parameters_after is None else r.parameters_after for r in records
    )
    return Totals(
        modules=sum(r.rank is not None for r in records),
        targets_before=before,
        targets_after=after,
        model_before=model_before,
        model_after=model_before - before + after,
        seconds=sum(r.seconds or 0.0 for r in records),
    )


def format_table(records: Sequence[ModuleRecord], totals: Totals) -> str:
    """A table for the terminal: one line a projection and shape, the range over its layers."""
    groups: dict[tuple[str, int, int], list[ModuleRecord]] = {}
    for record in records:
        key = (record.name.rpartition(".")[2], record.out_features, record.in_features)
        groups.setdefault(key, []).append(record)
    lines = [
        f"{'projection':<12} {'shape':>12} {'layers':>6} {'rank':>11} {'ratio':>6} "
        f"{'rel. error':>15} {'seconds':>8}"
    ]
    for (projection, m, n), members in groups.items():
        factored = [r for r in members if r.rank is not None]
        ranks = [r.rank for r in factored if r.rank is not None]
        errors = [r.relative_error for r in factored if r.relative_error is not None]
        total = summarize(members, 1)
        lines.append(
            f"{projection:<12} {f'{m}x{n}':>12} {len(members):>6} {span(ranks, 'd'):>11} "
            f"{total.ratio:>6.3f} {span(errors, '.3f'):>15} "
            f"{sum(r.seconds or 0 for r in members):>8.1f}"
        )
    lines.append(
        f"{totals.modules} modules factored; parameters stored after ÷ before: "
        f"{totals.ratio:.4f} over the targets, {totals.model_after / totals.model_before:.4f} over "
        f"the model ({totals.model_before:,} → {totals.model_after:,})"
    )
    return "\n".join(lines)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes that the model's parameters take in a checkpoint, tied tensors once.

    Quantized weights count at their bits plus scales and zero points as stored; padding by a format
    is not counted. Costs no data access, also where weights are offloaded.
    """
    seen: set[tuple[int, int]] = set()
    total = 0
    with disable_onloading():
        state = model.state_dict()
    for key, tensor in state.items():
        owner, _, name = key.rpartition(".")
        identity = (tensor.data_ptr() or id(tensor), tensor.numel())  # on disk there is no pointer
        if identity in seen and tensor.numel():
            continue
        seen.add(identity)
        scheme = getattr(model.get_submodule(owner), "quantization_scheme", None)
        weights = getattr(scheme, "weights", None)
        bits = 8 * tensor.element_size()
        if weights is not None and name == "weight":
            bits = weights.num_bits
        elif weights is not None and name == "weight_zero_point" and weights.symmetric:
            continue  # symmetric formats store none
        total += tensor.numel() * bits // 8
    return total


def parameter_count(model: nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    with disable_onloading():
        unique = {p.data_ptr() or id(p): p for p in model.parameters()}
    return sum(p.numel() for p in unique.values())


def span(values: Sequence[float], spec: str, *, none: str = "dense") -> str:
    """The range of values, formatted; ``none`` where there are none."""
    if not values:
        return none
    low, high = format(min(values), spec), format(max(values), spec)
    return low if low == high else f"{low}–{high}"
