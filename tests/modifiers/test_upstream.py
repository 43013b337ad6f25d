"""What we read of llm-compressor's recipes, modifiers and log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from torch import nn

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger

from cur_modifier.forms.base import factored_layers
from cur_modifier.modifiers import upstream
from cur_modifier.modifiers.cur.modifier import CURModifier
from cur_modifier.modifiers.heal.modifier import CURHealModifier
from cur_modifier.modifiers.prune.modifier import IDPruningModifier

LINEAR = nn.Linear(64, 64)


def every_layer(**fields: Any) -> CURModifier:
    return CURModifier(layers={"select": "all"}, rank={"fixed": 4}, mlflow=False, **fields)


def test_modifiers_before_and_after_are_those_of_the_recipe(recipe: Callable[..., Any]) -> None:
    first, second, third = (CURModifier(seed=seed, mlflow=False) for seed in range(3))
    recipe(first, second, third)
    assert upstream.modifiers_of_this_pass() == [first, second, third]
    assert upstream.preceding(second) == [first] and upstream.followers(second) == [third]
    alone = CURModifier(mlflow=False)  # of another recipe
    assert upstream.preceding(alone) == upstream.followers(alone) == []


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (lambda: every_layer(targets=["re:.*nothing$"]), "nothing"),
        (lambda: IDPruningModifier(multiple_of=4096, mlflow=False), "leaves no choice"),
        (lambda: CURHealModifier(batch_size=1000, mlflow=False), "batch_size 1000 is more"),
    ],
)
def test_a_mistake_in_a_later_stage_shows_before_the_first_one_works(
    later: Any, message: str, model: Any, batches: Any, state: Any, recipe: Callable[..., Any]
) -> None:
    first = recipe(every_layer(), later())
    with pytest.raises(ValueError, match=message):
        first.on_initialize(state)
    assert not factored_layers(model)


@pytest.mark.parametrize(
    ("modifier", "bits", "compresses"),
    [
        (GPTQModifier(scheme="W4A16", targets=["Linear"], ignore=["lm_head"]), 4, True),
        (QuantizationModifier(scheme="W8A8", targets=["re:.*q_proj$"]), 8, True),
        (SparseGPTModifier(sparsity=0.5, targets=["Linear"]), None, True),
        (CURModifier(mlflow=False), None, False),
    ],
)
def test_who_compresses_what_and_to_how_many_bits(
    modifier: Any, bits: int | None, compresses: bool
) -> None:
    assert upstream.compresses(modifier) is compresses
    assert upstream.weight_bits(modifier, "a.q_proj", LINEAR) == bits
    assert upstream.weight_bits(modifier, "lm_head", LINEAR) is None
    if compresses:
        assert upstream.matches(modifier, "a.q_proj", LINEAR)


def test_group_sizes_are_those_of_matching_schemes() -> None:
    gptq = GPTQModifier(scheme="W4A16", targets=["Linear"], ignore=["lm_head"])
    assert upstream.group_sizes(gptq, "a.q_proj", LINEAR) == [128]
    assert upstream.group_sizes(gptq, "lm_head", LINEAR) == []
    per_channel = QuantizationModifier(scheme="W8A8", targets=["Linear"])
    assert upstream.group_sizes(per_channel, "a.q_proj", LINEAR) == []
    assert upstream.group_sizes(SparseGPTModifier(sparsity=0.5), "a.q_proj", LINEAR) == []


def test_sparsity_blocks() -> None:
    assert upstream.prune_block(SparseGPTModifier(sparsity=0.5, mask_structure="2:4")) == 4
    assert upstream.prune_block(SparseGPTModifier(sparsity=0.5)) == 0
    assert upstream.prune_block(CURModifier(mlflow=False)) == 0


def test_the_recipe_is_kept_as_its_author_wrote_it(recipe: Callable[..., Any]) -> None:
    given = {"form": "id", "selection": "qdeim", "fit": "loss", "rank": {"ratio": 0.8}}
    recipe(CURModifier(mlflow=False, **given), CURModifier(mlflow=False, seed=3))
    [groups] = upstream.recipe_as_given().values()
    kept = [group["CURModifier"] for group in groups.values()]
    assert kept == [given | {"mlflow": False}, {"mlflow": False, "seed": 3}]
    assert yaml.safe_load(yaml.safe_dump(groups)) == groups
    again = CURModifier(**kept[0])
    assert again.model_dump() == CURModifier(mlflow=False, **given).model_dump()


def test_losses_of_followers_are_read_from_the_log() -> None:
    losses = upstream.FollowerLosses()
    logger.info("error 9.0")  # of nobody
    logger.info("Quantizing 2 module(s): ['a.id_s', 'a.id_t']")
    for value in ("2.5", "0.5", "7.0"):  # contexts close from the last to the first
        logger.log("INFO", f"error {value}")
    logger.info("Sparsifying b.id_s using 8 samples")
    logger.info("error 1e-3")
    losses.close()
    logger.info("Sparsifying c using 8 samples")
    logger.info("error 1.0")
    assert losses.by_module == {"a.id_t": 2.5, "a.id_s": 0.5, "b.id_s": 1e-3}
    losses.close()


def test_a_log_that_was_set_up_anew_is_closed_all_the_same() -> None:
    losses = upstream.FollowerLosses()
    logger.remove(losses._sink)
    losses.close()


def test_one_process_is_enough() -> None:
    upstream.refuse_distributed()
