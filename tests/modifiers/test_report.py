"""Rows, totals and the printed table of a stage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.modifiers.report import parameter_bytes, parameter_count


def test_tied_weights_count_once(
    offloaded_llama: nn.Module, small_llama: Callable[..., nn.Module]
) -> None:
    plain = small_llama(0, tie_word_embeddings=True)
    assert parameter_bytes(offloaded_llama) == parameter_bytes(plain)
    assert parameter_count(offloaded_llama) == parameter_count(plain)
