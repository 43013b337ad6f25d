"""Removal by the norms of weights alone: no data, no correction. The baseline of all others."""

from __future__ import annotations

import time
import zlib
from dataclasses import replace

import torch
from torch import nn

from cur_modifier.linalg.selection import Selection, norm, random
from cur_modifier.modifiers.prune.journal import PruningJournal
from cur_modifier.modifiers.prune.plan import Plan
from cur_modifier.modifiers.prune.report import UnitRecord
from cur_modifier.structure.operators import matrix_of
from cur_modifier.structure.removal import Units, remove

__all__ = ["remove_by_weight", "unit_norms"]


def remove_by_weight(model: nn.Module, plan: Plan, journal: PruningJournal) -> None:
    """Keep the units of largest norm, or random ones; consumers keep their columns."""
    settings = plan.settings
    places = {name: index for index, (name, _) in enumerate(plan.layers)}
    for units in plan.units:
        started = time.perf_counter()
        name, count = units.consumer, plan.counts[units.consumer]
        record = UnitRecord(
            name, places[units.layer], units.kind, units.count, count, plan.costs.unit[name]
        )
        if count == units.count:
            journal.records[name] = record
            continue
        if settings.selection is Selection.RANDOM:
            seed = settings.seed ^ zlib.crc32(name.encode())
            kept = random(units.count, count, torch.Generator().manual_seed(seed))
        else:
            kept = norm(unit_norms(model, units)[:, None], count)
        remove(model, units, kept.sort().values)
        journal.removed(replace(record, seconds=time.perf_counter() - started))


def unit_norms(model: nn.Module, units: Units) -> torch.Tensor:
    """``(units,)`` Frobenius norms of all weights of a unit: its rows in the producers, its columns
    in the consumer. Biases are left out."""
    columns = matrix_of(model.get_submodule(units.consumer)).double().square().sum(0)
    squares = columns[units.reads.to(columns.device)].sum(1)
    for name, features in units.producers.items():
        rows = matrix_of(model.get_submodule(name)).double().square().sum(1)
        squares += rows[features.to(rows.device)].sum(1)
    return squares.sqrt()
