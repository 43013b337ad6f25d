"""What a stage removed, as rows and a printed table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cur_modifier.modifiers.report import span

__all__ = ["UnitRecord", "format_table", "totals"]


@dataclass
class UnitRecord:
    """The units of one kind in one layer.

    Attributes:
        name: of the consumer.
        cost: what the budget counts of one of them.
        relative_error: ``‖(T − W' X⁺) G^{1/2}‖ ÷ ‖T G^{1/2}‖``, of what the consumer answers.
        expected_growth: of the loss in nats a token or image, by the curvature; None where not
            measured.
        max_entry: the largest entry of the interpolation.
    """

    name: str
    layer: int
    kind: str
    before: int
    after: int
    cost: int
    relative_error: float | None = None
    expected_growth: float | None = None
    max_entry: float | None = None
    tokens: int | None = None
    seconds: float | None = None

    def row(self) -> dict[str, Any]:
        """A flat row."""
        return asdict(self)


def totals(
    records: Sequence[UnitRecord], counted: tuple[int, int], parameters: tuple[int, int]
) -> dict[str, float]:
    """Flat metrics with their units in the names.

    Args:
        counted: what the budget counts, before and after.
        parameters: of the model, before and after.
    """
    counts: dict[str, float] = {}
    for record in records:
        for when, value in (("before", record.before), ("after", record.after)):
            key = f"{record.kind}_{when}"
            counts[key] = counts.get(key, 0) + value
    return counts | {
        "ratio_budget": counted[1] / counted[0],
        "parameters_model_before": parameters[0],
        "parameters_model_after": parameters[1],
        "ratio_model": parameters[1] / parameters[0],
        "removing_seconds": sum(r.seconds or 0.0 for r in records),
    }


def format_table(records: Sequence[UnitRecord], summed: dict[str, float], counted: str) -> str:
    """A table for the terminal: one line a kind and size, the range over its layers."""
    groups: dict[tuple[str, int], list[UnitRecord]] = {}
    for record in records:
        groups.setdefault((record.kind, record.before), []).append(record)
    lines = [
        f"{'units':<10} {'layers':>6} {'before':>8} {'after':>12} {'kept':>6} {'rel. error':>15} "
        f"{'seconds':>8}"
    ]
    for (kind, before), members in groups.items():
        after = [r.after for r in members]
        errors = [r.relative_error for r in members if r.relative_error is not None]
        whole = all(r.after == r.before for r in members)
        kept = sum(after) / (before * len(members))
        lines.append(
            f"{kind:<10} {len(members):>6} {before:>8} {span(after, 'd'):>12} {kept:>6.3f} "
            f"{span(errors, '.3f', none='whole' if whole else 'unknown'):>15} "
            f"{sum(r.seconds or 0 for r in members):>8.1f}"
        )
    lines.append(
        f"{counted} after ÷ before: {summed['ratio_budget']:.4f} over the budget, parameters "
        f"{summed['ratio_model']:.4f} over the model ({int(summed['parameters_model_before']):,} → "
        f"{int(summed['parameters_model_after']):,})"
    )
    return "\n".join(lines)
