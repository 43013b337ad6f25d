"""The contexts of our own passes."""

from __future__ import annotations

import pytest
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.passes.context import frozen


def test_the_parameters_themselves_are_frozen(offloaded_llama: nn.Module) -> None:
    from compressed_tensors.offload import disable_onloading

    with frozen(offloaded_llama), disable_onloading():
        assert not any(p.requires_grad for p in offloaded_llama.parameters())
    with disable_onloading():
        assert all(p.requires_grad for p in offloaded_llama.parameters())
