"""Every recipe opens with its command, loads, and runs as it is on a model of usual widths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import llmcompressor
import pytest
import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
from safetensors import safe_open
from support import NO_PROCESSOR, REPOSITORY, W8A8, Compress, recipe_text, refusal
from transformers import AutoModelForCausalLM

from cur_modifier import compress as run
from cur_modifier.forms.base import FactoredLinear

RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
LONG = ("prune_free", "prune_refined", "prune_then_gptq")  # prune and prune_then_id are their like


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
        "prune",
        "prune_free",
        "prune_refined",
        "prune_then_gptq",
        "prune_then_id",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_opens_with_its_command_and_is_listed(path: Path) -> None:
    head = path.read_text().split("compress_stage:")[0]
    assert f"python recipes/run.py recipes/{path.name} " in head
    assert f"({path.name})" in (REPOSITORY / "recipes" / "README.md").read_text()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.thorough if path.stem in LONG else ())
        for path in RECIPES
    ],
)
def test_runs_as_it_is(path: Path, tiny: Any, tiny_data: Any, tmp_path: Path) -> None:
    assert len(Recipe.create_instance(str(path)).modifiers) >= 1
    oneshot(model=tiny, dataset=tiny_data, recipe=str(path), processor=NO_PROCESSOR)
    factored = [m for m in tiny.modules() if isinstance(m, FactoredLinear)]
    budget = "budget: sensitivity" in path.read_text()  # under which a module may stay dense
    if path.stem.startswith("prune"):
        neurons = [layer.mlp.down_proj.in_features for layer in tiny.model.layers]
        assert sum(neurons) < 13 * 512 and all(count % 64 == 0 for count in neurons)
        assert bool(factored) == (path.stem == "prune_then_id")
    else:
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


CUR = "    CURModifier: {form: id}\n"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("compress:\n  cur_modifiers:\n" + CUR, "pass over compress; .* ends in _stage"),
        ("a_stage:\n  cur_modifier:\n" + CUR, "pass over cur_modifier; .* ends in _modifiers"),
        ("a_stage:\n  cur_modifiers:\n    CURModifier:\n", "it is `CURModifier: {}`"),
        ("a_stage:\n  cur_modifiers:\n  - CURModifier: {}\n", "cur_modifiers is no mapping"),
        ("a_stage:\n  cur_modifiers:\n" + CUR.replace("form", "from"), "recipe.yaml: (?s:.*)from"),
        ("a_stage:\n  cur_modifiers:\n    Unknown: {}\n", "recipe.yaml: .*Unknown"),
        ("a_stage: [", "is not YAML"),
        ("", "names no modifier"),
        ("a_stage: {}", "names no modifier"),
        ("a_stage: {run_type: oneshot}", "names no modifier"),
        ("just words", "names no modifier"),
    ],
)
def test_a_recipe_of_which_a_part_would_do_nothing_is_refused(
    recipe: str, message: str, tmp_path: Path
) -> None:
    """llm-compressor says nothing of most of these, or ends with an AttributeError."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(ValueError, match=message):
        run.check_recipe(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibrate": "/nowhere/text.txt"}, "no file or folder '/nowhere/text.txt'"),
        ({"samples": 4000}, "wiki.valid.raw: the text has .* but 4000 windows of 512 need"),
        ({"samples": 0}, "not a whole number from 1"),
        ({"evaluate": "/nowhere/text.txt"}, "no file or folder '/nowhere/text.txt'"),
        ({"evaluate": "{text}", "windows": 4000}, "but 4000 windows of 1024 need"),
        ({"model": "/nowhere/model"}, "no checkpoint at /nowhere/model"),
        ({"output": "{text}"}, "is a file"),
        ({"results": "{text}"}, "not a list of measured rows"),
        ({"output": "{text}/out"}, "lies below .*wiki.valid.raw, which is a file"),
        ({"results": "{text}/out/rows.json"}, "lies below .*wiki.valid.raw, which is a file"),
    ],
)
def test_bad_input_is_named_before_the_slow_part(
    change: dict[str, str],
    message: str,
    bench_model: Path,
    bench_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = bench_data / "wikitext2-raw" / "wiki.valid.raw"
    given = {"model": bench_model, "calibrate": text, "output": tmp_path / "out", **change}
    given = {key: str(value).format(text=text) for key, value in given.items()}
    found = refusal(run, given, capsys, [str(REPOSITORY / "recipes" / "id.yaml")])
    assert re.search(message, found), found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["id", "id.yaml"])
def test_a_recipe_that_comes_with_the_package_is_found_by_its_name(name: str) -> None:
    found = run.parse([name, "--model", "m", "--calibrate", "t", "--output", "out"]).recipe
    assert found == REPOSITORY / "recipes" / "id.yaml"


def test_a_file_goes_before_a_recipe_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "id.yaml").touch()  # tests start there
    assert run.find_recipe("id.yaml") == Path("id.yaml")
    assert run.find_recipe("nothing") == Path("nothing")


def test_outside_a_clone_smollm2_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tools", "tools.smollm2"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FileNotFoundError, match=r"tools/smollm2.py of .* name another model"):
        run.model_source("smollm2")


def test_the_command_is_that_of_the_package(tmp_path: Path) -> None:
    """By a whole path, from another folder."""
    command = [sys.executable, str(REPOSITORY / "recipes" / "run.py")]
    done = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: run.py" in done.stdout
    given = ["nothing", "--model", "m", "--calibrate", "t", "--output", "out"]
    done = subprocess.run([*command, *given], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "no recipe nothing; see recipes/README.md" in done.stderr


def test_an_output_may_lie_beside_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY / "recipes")
    given = ["id.yaml", "--model", "m", "--calibrate", "t", "--output", "out", "--results", "r"]
    assert run.parse(given).output == Path("out")


def test_rows_of_one_recipe_on_other_texts_stand_side_by_side() -> None:
    key = run.row_key
    row = {"recipe": "id", "model": "smollm2", "calibration": "32 x 512 of a", "dtype": "float16"}
    assert key(row) == key(row | {"seconds": 3.0})
    for name in (*row, "evaluation"):
        assert key(row) != key(row | {name: "another"})


def test_compress_fixture_runs_recipe_text(tiny: Any, compress: Compress) -> None:
    compress(tiny, {"rank": {"fixed": 16}, "layers": {"select": "last", "count": 2}})
    names = [n for n, m in tiny.named_modules() if isinstance(m, FactoredLinear)]
    assert {name.split(".")[2] for name in names} == {"11", "12"}


@pytest.mark.parametrize("units", [True, False])
def test_checkpoints_are_bfloat16_on_every_machine(
    units: bool,
    bench_model: Path,
    bench_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units})
    worked_in: list[torch.dtype] = []

    def observed(**given: Any) -> None:
        worked_in.append(given["model"].dtype)
        oneshot(**given)

    monkeypatch.setattr(llmcompressor, "oneshot", observed)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text({"rank": {"fixed": 16}, "layers": {"select": "all"}}, W8A8))
    text = bench_data / "wikitext2-raw" / "wiki.valid.raw"
    run.compress(recipe, str(bench_model), text, tmp_path / "out", samples=4, sequence_length=64)
    assert worked_in == [torch.bfloat16 if units else torch.float32]
    [file] = (tmp_path / "out").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        found = {tensors.get_tensor(name).dtype for name in tensors.keys()}  # noqa: SIM118
    assert torch.float32 not in found and torch.bfloat16 in found
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype is torch.bfloat16
    assert 200 < run.measure(tmp_path / "out", str(text), windows=2, sequence_length=64) < 400
