"""The modules that a stage factors, alone or together."""

from __future__ import annotations

import pytest
from torch import nn

pytest.importorskip("llmcompressor")

from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import FORMS
from cur_modifier.modifiers.cur.candidates import Candidate


@pytest.mark.parametrize("form", FORMS)
def test_factors_lie_where_the_weights_do(offloaded_llama: nn.Module, form: str) -> None:
    linear = offloaded_llama.model.layers[0].self_attn.q_proj
    [factored] = (
        Candidate(members={"q": linear}, layer=0, rank=4).empty_modules(find_form(form)).values()
    )
    assert {p.device.type for p in factored.parameters()} == {"cpu"}
