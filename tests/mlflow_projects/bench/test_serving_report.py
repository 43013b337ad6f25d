"""The report of the serving benchmark."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("matplotlib")

from cur_modifier.forms.sizes import FORMS
from mlflow_projects.bench.serving.report import plot, table


def row(form: str) -> dict[str, Any]:
    return {
        "model": "smollm2",
        "dtype": "float32",
        "form": form,
        "ratio": 0.8,
        "quantization": None,
        "phase": "decode",
        "batch": 1,
        "tokens_per_second": 30.0,
        "projection_bytes_ratio": 0.8,
        "speedup_over_dense": 1.1,
        "speedup_over_dense_range": [1.0, 1.2],
        "linear_speedup": 1.2,
        "speedup_over_quantized": None,
    }


def test_every_form_has_a_row_and_a_point() -> None:
    rows = [row(form) for form in FORMS]
    shown = table(rows)
    axes = plot(rows).axes[0]
    names = [text.get_text() for text in axes.texts]
    assert names == [f"{form}-0.8" for form in FORMS]
    assert all(name in shown for name in names)
