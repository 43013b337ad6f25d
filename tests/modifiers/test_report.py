"""Rows, totals and the printed table of a stage."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.report import (
    ModuleRecord,
    format_table,
    parameter_bytes,
    parameter_count,
    summarize,
)


def test_tied_weights_count_once(
    offloaded_llama: nn.Module, small_llama: Callable[..., nn.Module]
) -> None:
    plain = small_llama(0, tie_word_embeddings=True)
    assert parameter_bytes(offloaded_llama) == parameter_bytes(plain)
    assert parameter_count(offloaded_llama) == parameter_count(plain)


def record(name: str, layer: int, **fields: Any) -> ModuleRecord:
    shape = {"out_features": 8, "in_features": 4, "parameters_before": 32}
    return ModuleRecord(name=f"layers.{layer}.{name}", layer=layer, form="id", **shape | fields)


FITTED = {"rank": 2, "parameters_after": 20, "relative_error": 0.25, "seconds": 1.5}


def test_a_row_is_flat_with_a_column_for_every_loss() -> None:
    row = record("q", 0, losses={"id_s": 0.5, "id_t": 0.25}, **FITTED).row()
    assert row["loss.id_s"] == 0.5 and row["loss.id_t"] == 0.25 and "losses" not in row
    assert row["rank"] == 2 and row["tokens"] is None


def test_what_stays_dense_counts_with_all_of_its_parameters() -> None:
    totals = summarize([record("q", 0, **FITTED), record("q", 1)], 1000)
    assert (totals.modules, totals.targets_before, totals.targets_after) == (1, 64, 52)
    assert (totals.model_before, totals.model_after) == (1000, 988)
    assert totals.ratio == 52 / 64 and totals.seconds == 1.5
    metrics = totals.metrics()
    assert metrics["ratio_model"] == 0.988 and metrics["modules_factored"] == 1


def test_the_table_has_a_line_for_every_projection_and_shape() -> None:
    records = [
        record("q", 0, **FITTED),
        record("q", 1, **FITTED | {"rank": 3, "relative_error": 0.5}),
        record("v", 0),
    ]
    head, q, v, total = format_table(records, summarize(records, 1000)).splitlines()
    assert head.split()[:2] == ["projection", "shape"]
    assert q.split() == ["q", "8x4", "2", "2–3", "0.625", "0.250–0.500", "3.0"]
    assert v.split() == ["v", "8x4", "1", "dense", "1.000", "dense", "0.0"]
    assert total.startswith("2 modules factored") and "(1,000 → 976)" in total


def test_quantized_weights_count_at_their_bits() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 2))
    plain = parameter_bytes(model)
    assert plain == 4 * (32 + 8 + 2) and parameter_count(model) == 42
    weights = SimpleNamespace(num_bits=4, symmetric=True)
    model[0].quantization_scheme = SimpleNamespace(weights=weights)
    model[0].register_buffer("weight_scale", torch.ones(4, 1))
    model[0].register_buffer("weight_zero_point", torch.zeros(4, 1))
    assert parameter_bytes(model) == plain - 32 * 4 + 32 // 2 + 4 * 4
