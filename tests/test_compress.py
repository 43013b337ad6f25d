"""The command that runs one recipe: what it finds, and what it refuses before the slow part."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")

from cur_modifier.compress import (
    check_folder,
    check_recipe,
    count,
    find_recipe,
    model_source,
    parse,
    shipped_recipes,
    weight_bytes,
    whole,
)

GIVEN = ["--model", "smollm2", "--calibrate", "text.txt"]


def test_every_shipped_recipe_is_found_by_name_and_holds() -> None:
    recipes = shipped_recipes()
    assert {"id", "cur", "id_then_gptq"} <= recipes.keys()
    for name, path in recipes.items():
        assert find_recipe(name) == find_recipe(f"{name}.yaml") == path
        check_recipe(path)


def test_a_file_goes_before_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "id.yaml").write_text("mine: {}")
    assert find_recipe("id.yaml") == Path("id.yaml")
    assert find_recipe("no such recipe") == Path("no such recipe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("{}", "names no modifier"),
        ("my_stages: {}", "pass over my_stages; the name of a stage ends in _stage"),
        ("a_stage: {cur: {}}", "pass over cur; the name of a group of modifiers ends in"),
        ("a_stage: {a_modifiers: {CURModifier: 3}}", "modifier CURModifier is no mapping"),
        ("a_stage: {a_modifiers: {CURModifier: {form: svd}}}", "no form 'svd'"),
    ],
)
def test_recipes_that_would_do_nothing_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        check_recipe(path)


@pytest.mark.parametrize(("text", "value"), [("64", 64), ("64.0", 64), ("1", 1)])
def test_whole_numbers_are_read_as_mlflow_writes_them(text: str, value: int) -> None:
    assert count(text) == whole(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "inf", "nan"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not a whole number from 1"):
        count(text)
    assert whole("0") == 0


def test_models_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        model_source(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no checkpoint at /no/such/model"):
        model_source("/no/such/model")
    (tmp_path / "config.json").write_text("{}")
    assert model_source(str(tmp_path)) == str(tmp_path.resolve())
    assert model_source("some/model") == "some/model"


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path: Path, capsys: object) -> None:
    (tmp_path / "file").write_text("")
    parser = argparse.ArgumentParser()
    check_folder(parser, "output", tmp_path / "new" / "folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit):
            check_folder(parser, "output", folder)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(["id", *GIVEN, "--output", str(tmp_path)])
    assert options.recipe.name == "id.yaml" and options.samples == 32
    with pytest.raises(SystemExit):
        parse(["no_such", *GIVEN, "--output", str(tmp_path)])
    assert "no recipe no_such" in capsys.readouterr().err


def test_only_a_checkpoint_s_own_weights_count(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "other.safetensors"):
        (tmp_path / name).write_bytes(b"12345")
    assert weight_bytes(tmp_path) == 10
