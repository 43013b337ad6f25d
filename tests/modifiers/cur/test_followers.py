"""What later stages will do to the factors, said before anything is calibrated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

from cur_modifier.forms.registry import find_form
from cur_modifier.forms.sizes import FORMS
from cur_modifier.modifiers.cur.candidates import find_candidates
from cur_modifier.modifiers.cur.config import RankConfig
from cur_modifier.modifiers.cur.followers import check_followers, follower_bits
from cur_modifier.modifiers.cur.ranks import with_ranks
from cur_modifier.structure.layers import decoder_layers

from .stages import Q, stage

Recipe = Callable[..., Any]


def groups(size: int, **fields: Any) -> GPTQModifier:
    weights = {"num_bits": 4, "strategy": "group", "group_size": size, "symmetric": True}
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return GPTQModifier(**{"config_groups": scheme, "ignore": ["lm_head"]} | fields)


def checked(model: Any, recipe: Recipe, later: Any, *, rank: int = 4, form: str = "id") -> None:
    settings = recipe(stage(), *([later] if later else []))
    found = find_candidates(model, decoder_layers(model), [1], ["re:.*q_proj$"], [])
    planned = with_ranks(found, find_form(form), RankConfig(fixed=rank), 1)
    check_followers(model, settings, planned, find_form(form), 1)


@pytest.mark.parametrize("later", [None, groups(4), QuantizationModifier(scheme="W8A8")])
def test_what_divides_is_let_through_without_a_word(
    model: Any, recipe: Recipe, logged: list[str], later: Any
) -> None:
    logged.clear()
    checked(model, recipe, later)
    assert not [m for m in logged if "targets and ignore" in m]


@pytest.mark.parametrize("form", FORMS)
def test_a_group_that_divides_no_rank_is_named(model: Any, recipe: Recipe, form: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){Q}\..*: 6 inputs, group_size 4.*`multiple_of`"):
        checked(model, recipe, groups(4), rank=6, form=form)


def test_dense_inputs_are_named_too(model: Any, recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"(?s)down_proj: 24 inputs, group_size 16.*choose a size"):
        checked(model, recipe, groups(16), rank=4)


def test_sparsity_blocks_divide_as_well(model: Any, recipe: Recipe) -> None:
    later = SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"])
    checked(model, recipe, later)
    with pytest.raises(ValueError, match=r"6 inputs, sparsity blocks of 4"):
        checked(model, recipe, later, rank=6)


@pytest.mark.parametrize(
    ("ignore", "what"),
    [("re:.*q_proj$", "would still compress them"), ("re:.*q_proj[.].*$", "leaves their factors")],
)
def test_patterns_for_dense_modules_cost_a_warning(
    model: Any, recipe: Recipe, logged: list[str], ignore: str, what: str
) -> None:
    checked(model, recipe, groups(4, ignore=["lm_head", ignore]))
    [warning] = [m for m in logged if "targets and ignore were written for dense" in m]
    assert what in warning and "id_s/id_t" in warning


def test_bits_are_those_of_the_first_factor(model: Any, recipe: Recipe) -> None:
    form = find_form("id")
    found = find_candidates(model, decoder_layers(model), [1], ["re:.*q_proj$"], [])
    [candidate] = with_ranks(found, form, RankConfig(fixed=4), 1)
    settings = stage()
    for later, bits in (
        ([], None),
        ([groups(4)], 4),
        ([QuantizationModifier(scheme="W8A8"), groups(4)], 4),
        ([groups(4, ignore=["re:.*id_s$"])], None),
        ([groups(4, ignore=["re:.*id_t$"])], 4),
    ):
        recipe(settings, *later)
        assert follower_bits(settings, candidate, form) == bits
