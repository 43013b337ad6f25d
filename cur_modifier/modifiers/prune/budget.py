"""How many units each layer keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cur_modifier.linalg import RankCurve, allocate_ranks
from cur_modifier.modifiers.prune.config import BudgetConfig, Measure
from cur_modifier.modifiers.report import parameter_count
from cur_modifier.structure.layers import below
from cur_modifier.structure.operators import as_matrix, matrix_of
from cur_modifier.structure.removal import Kind, Units

__all__ = ["Costs", "by_sensitivity", "costs_of", "evenly"]


@dataclass(frozen=True)
class Costs:
    """What is counted, before anything is removed.

    Attributes:
        unit: of one unit, by the consumer's name.
        total: of all that the budget is a share of.
        shared: what two units have in common, by their consumers' names: a convolution that reads
            the one and computes the other goes but once.
    """

    unit: Mapping[str, int]
    total: int
    shared: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def left(self, units: Sequence[Units], counts: Mapping[str, int]) -> int:
        """What is left with so many units kept, by the consumer's name."""
        gone = {u.consumer: u.count - counts[u.consumer] for u in units}
        once = sum(number * self.unit[name] for name, number in gone.items())
        twice = sum(gone[one] * gone[other] * w for (one, other), w in self.shared.items())
        return self.total - once + twice


def costs_of(
    model: nn.Module,
    units: Sequence[Units],
    measure: Measure,
    sequence_length: int,
    positions: Mapping[str, int] | None = None,
) -> Costs:
    """Parameters, or multiply-accumulates of one sequence, of the layers that hold the units.

    Args:
        positions: of one image, how often each module multiplies, by its name. In place of
            ``sequence_length``, for convolutions.
    """
    layers = dict.fromkeys(each.layer for each in units)
    if measure == "macs" and positions:
        unit = {u.consumer: _image_macs(model, u, positions) for u in units}
        names = [n for n in positions if any(n.startswith(below(layer)) for layer in layers)]
        weights = {n: model.get_parameter(f"{n}.weight").numel() for n in names}
        total = sum(weights[n] * positions[n] for n in names)
        return Costs(unit, total, _shared(units, positions))
    if measure == "macs":
        unit = {u.consumer: _macs(model, u, sequence_length) for u in units}
        products = sum(_products(model.get_submodule(name), sequence_length) for name in layers)
        attention = len(layers) * _attention(_query_width(model), sequence_length)
        return Costs(unit, products + attention)
    unit = {u.consumer: _parameters(model, u) for u in units}
    counted = [model] if measure == "parameters" else [model.get_submodule(n) for n in layers]
    return Costs(unit, sum(map(parameter_count, counted)), _shared(units, {}))


def by_sensitivity(
    units: Sequence[Units],
    costs: Costs,
    growth: Mapping[str, torch.Tensor],
    budget: BudgetConfig,
    multiple_of: Mapping[Kind, int],
    *,
    alike: bool,
) -> dict[str, int]:
    """Units to keep by the consumer's name, where the loss grows least.

    Args:
        growth: ``(units + 1,)`` by the consumer's name: what the loss grows by with so many kept.
        multiple_of: every count is a multiple, or all.
        alike: the same count in all layers.

    Raises:
        ValueError: the budget is too small for the least counts.
    """
    groups: dict[object, list[Units]] = {}
    for each in units:
        groups.setdefault(each.kind if alike else each.consumer, []).append(each)
    curves = []
    for group in groups.values():
        step, count = multiple_of[group[0].kind], group[0].count
        price = step * sum(costs.unit[each.consumer] for each in group)
        curves.append(
            RankCurve(
                loss=sum(growth[each.consumer] for each in group)[::step],  # type: ignore[index]
                factored=lambda kept, price=price: kept * price,  # type: ignore[misc]
                dense=sum(count * costs.unit[each.consumer] for each in group),
                limit=(count - 1) // step,
            )
        )
    free = sum(curve.dense for curve in curves)

    def counts_for(wanted: float) -> dict[str, int]:
        picked = allocate_ranks(curves, wanted / free, least=budget.floor)
        counts: dict[str, int] = {}
        for group, kept in zip(groups.values(), picked, strict=True):
            for each in group:
                step = multiple_of[each.kind]
                counts[each.consumer] = each.count if kept is None else kept * step
        return counts

    wanted = budget.share * costs.total - (costs.total - free)
    if costs.shared:
        return _within(units, costs, budget, counts_for, _least(budget, curves), free)
    _require(wanted, free, costs, budget, curves)
    return counts_for(wanted)


def evenly(
    units: Sequence[Units], costs: Costs, budget: BudgetConfig, multiple_of: Mapping[Kind, int]
) -> dict[str, int]:
    """The same share of every kind: the largest, rounded down to multiples, within the budget.

    Raises:
        ValueError: not even the smallest multiples are within it.
    """
    shares = sorted({k / u.count for u in units for k in range(1, u.count + 1)}, reverse=True)
    for share in shares:
        counts = {
            u.consumer: max(_down(share * u.count, multiple_of[u.kind], u.count), 1) for u in units
        }
        if costs.left(units, counts) <= budget.share * costs.total:
            return counts
    raise ValueError(_too_small(costs, budget, costs.left(units, counts)))


def _down(wanted: float, step: int, count: int) -> int:
    whole = int(wanted + 1e-9)
    return count if whole == count else max(whole - whole % step, min(step, count))


def _require(
    wanted: float,
    free: int,
    costs: Costs,
    budget: BudgetConfig,
    curves: Sequence[RankCurve],
) -> None:
    least = _least(budget, curves)
    if least > wanted:
        raise ValueError(_too_small(costs, budget, int(costs.total - free + least)))


def _least(budget: BudgetConfig, curves: Sequence[RankCurve]) -> int:
    """What the smallest counts that may be kept cost."""
    least = 0
    for curve in curves:
        enough = [
            curve.stored(k)
            for k in range(1, curve.limit + 1)
            if curve.stored(k) >= budget.floor * curve.dense
        ]
        least += min(enough, default=curve.dense)
    return least


def _within(
    units: Sequence[Units],
    costs: Costs,
    budget: BudgetConfig,
    counts_for: Callable[[float], dict[str, int]],
    least: int,
    free: int,
) -> dict[str, int]:
    """Counts whose cost is within the budget where units share some: the summed prices that are
    allowed are bisected until it is."""
    allowed = budget.share * costs.total
    low, high = float(least + 1), float(free)
    found = counts_for(low)
    if (left := costs.left(units, found)) > allowed:
        raise ValueError(_too_small(costs, budget, left))
    while high - low > min(costs.unit.values()):
        middle = (low + high) / 2
        trial = counts_for(middle)
        if costs.left(units, trial) > allowed:
            high = middle
        else:
            low, found = middle, trial
    return found


def _shared(units: Sequence[Units], positions: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """What a unit that a module reads and one that it computes have in common."""
    found: dict[tuple[str, str], int] = {}
    reading = {each.consumer: each for each in units}
    for each in units:
        for name, features in each.producers.items():
            if (other := reading.get(name)) is not None:
                product = features.shape[1] * other.reads.shape[1]
                found[each.consumer, other.consumer] = product * positions.get(name, 1)
    return found


def _too_small(costs: Costs, budget: BudgetConfig, least: int) -> str:
    counted = "multiply-accumulates" if budget.measure == "macs" else "parameters"
    return (
        f"budget {budget.measure} {budget.share} allows {int(budget.share * costs.total)} of "
        f"{costs.total} {counted}, and the smallest counts that may be kept leave {least} "
        f"({least / costs.total:.3f}). Raise the budget, lower `budget.least` "
        f"({budget.floor:g}) or `multiple_of`, or name more kinds in `units`."
    )


def _parameters(model: nn.Module, units: Units) -> int:
    total = 0
    for name, features in units.producers.items():
        module = model.get_submodule(name)
        inputs = matrix_of(module).shape[1] + (getattr(module, "bias", None) is not None)
        total += features.shape[1] * inputs
    for name in units.norms:
        total += sum(p.numel() for p in model.get_submodule(name).parameters()) // units.count
    return total + units.reads.shape[1] * matrix_of(model.get_submodule(units.consumer)).shape[0]


def _image_macs(model: nn.Module, units: Units, positions: Mapping[str, int]) -> int:
    outputs = len(matrix_of(model.get_submodule(units.consumer)))
    total = positions[units.consumer] * units.reads.shape[1] * outputs
    for name, features in units.producers.items():
        inputs = matrix_of(model.get_submodule(name)).shape[1]
        total += positions[name] * features.shape[1] * inputs
    return total


def _macs(model: nn.Module, units: Units, tokens: int) -> int:
    total = units.reads.shape[1] * matrix_of(model.get_submodule(units.consumer)).shape[0]
    for name, features in units.producers.items():
        total += features.shape[1] * matrix_of(model.get_submodule(name)).shape[1]
    queries = units.reads.shape[1] if units.kind == "heads" else 0
    return total * tokens + _attention(queries, tokens)


def _attention(width: int, tokens: int) -> int:
    """Products of queries of so many features with keys, and of weights with values."""
    return 2 * tokens * tokens * width


def _query_width(model: Any) -> int:
    """Features of all queries of a layer, as the config counts heads; 0 without attention."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return int(heads * size)


def _products(layer: nn.Module, tokens: int) -> int:
    matrices = (as_matrix(module) for module in layer.modules())
    return tokens * sum(matrix.numel() for matrix in matrices if matrix is not None)
