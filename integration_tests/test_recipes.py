"""Every recipe opens with its command, loads, and runs as it is on a model of usual widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
from support import NO_PROCESSOR, REPOSITORY, Compress

from cur_modifier.factored import FactoredLinear

RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {p.stem for p in RECIPES} >= {
        "cur",
        "cur_then_gptq",
        "cur_then_sparsegpt",
        "cur_then_w8a8",
        "cur_healed",
        "id",
        "id_refined",
        "id_refined_then_gptq",
        "id_then_gptq",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_opens_with_its_command_and_is_listed(path: Path) -> None:
    head = path.read_text().split("compress_stage:")[0]
    assert f"python recipes/run.py recipes/{path.name} " in head
    assert f"({path.name})" in (REPOSITORY / "recipes" / "README.md").read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_runs_as_it_is(path: Path, tiny: Any, tiny_data: Any, tmp_path: Path) -> None:
    assert len(Recipe.create_instance(str(path)).modifiers) >= 1
    oneshot(model=tiny, dataset=tiny_data, recipe=str(path), processor=NO_PROCESSOR)
    factored = [m for m in tiny.modules() if isinstance(m, FactoredLinear)]
    budget = "budget: sensitivity" in path.read_text()  # under which a module may stay dense
    assert len(factored) in (30, 7 * 13) or (budget and 7 * 10 < len(factored) < 7 * 13)
    tiny.save_pretrained(tmp_path / "out", save_compressed=True)
    saved = tmp_path / "out" / "recipe_as_given.yaml"
    assert holds(yaml.safe_load(saved.read_text()), yaml.safe_load(path.read_text()))
    again, first = (Recipe.create_instance(str(p)).modifiers for p in (saved, path))
    assert again[0].model_dump() == first[0].model_dump()
    assert [type(m) for m in again] == [type(m) for m in first]


def holds(saved: Any, given: Any) -> bool:
    """Whether every field that was given is in what was saved."""
    if isinstance(given, dict):
        return all(key in saved and holds(saved[key], value) for key, value in given.items())
    return saved == given


def test_compress_fixture_runs_recipe_text(tiny: Any, compress: Compress) -> None:
    compress(tiny, {"rank": {"fixed": 16}, "layers": {"select": "last", "count": 2}})
    names = [n for n, m in tiny.named_modules() if isinstance(m, FactoredLinear)]
    assert {name.split(".")[2] for name in names} == {"11", "12"}
