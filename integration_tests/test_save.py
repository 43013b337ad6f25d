"""Saving: all of it or nothing, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_disk import small_disk
from support import Compress
from transformers import AutoModelForCausalLM, PreTrainedModel

from cur_modifier.checkpoint import save
from cur_modifier.forms.schema import SchemaError

CUR = {"rank": {"fixed": 32}, "layers": {"select": [5]}}


@pytest.fixture
def factored(tiny: Any, compress: Compress) -> Any:
    compress(tiny, CUR)
    return tiny


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_interrupted_save_leaves_nothing(
    factored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "annotate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        factored.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out*")) == []


def test_interrupted_save_keeps_the_earlier_one(
    factored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factored.save_pretrained(tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(save, "annotate", fail)
    with pytest.raises(OSError, match="No space"):
        factored.save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_leftover_of_a_killed_save_is_cleared(factored: Any, tmp_path: Path) -> None:
    leftover = tmp_path / ".out.incomplete"
    leftover.mkdir()
    (leftover / "stale.safetensors").write_text("half")
    factored.save_pretrained(tmp_path / "out")
    assert not leftover.exists()
    assert not (tmp_path / "out" / "stale.safetensors").exists()


def test_other_files_in_the_directory_are_kept(factored: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "tokenizer.json").write_text("{}")
    (out / "sub" / "notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("stale shard")
    factored.save_pretrained(out)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "sub" / "notes.txt").read_text() == "mine"
    assert not (out / "model-00001-of-00002.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(out)


def test_weights_of_other_things_are_kept(factored: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    others = ["adapter_model.safetensors", "optimizer.bin", "training_args.bin"]
    for name in others:
        (out / name).write_text("mine")
    factored.save_pretrained(out)
    assert [(out / name).read_text() for name in others] == ["mine"] * 3


def test_a_link_is_followed(factored: Any, tmp_path: Path) -> None:
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "out").symlink_to("large_disk")
    for _ in range(2):
        factored.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large_disk", "out"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "large_disk")


def test_a_mount_point(factored: Any, tmp_path: Path) -> None:
    """As a container's volume is: it can't be renamed."""
    with small_disk(tmp_path, kibibytes=2**16) as out:
        (out / "tokenizer.json").write_text("{}")
        factored.save_pretrained(out, max_shard_size="2MB")
        factored.save_pretrained(out)
        names = {file.name for file in out.iterdir()}
        assert {"tokenizer.json", "config.json", "model.safetensors"} <= names
        assert not [name for name in names if "-of-" in name or name.startswith(".")]
        AutoModelForCausalLM.from_pretrained(out)


def test_a_save_that_can_not_be_put_in_place_is_kept(
    factored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factored.save_pretrained(tmp_path / "out")
    rename = os.rename

    def busy(source: Path, target: Path) -> None:
        if target == tmp_path / "out" and source.name == ".out.incomplete":
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(OSError, match=r"complete.*in .*\.out\.incomplete: move it"):
        factored.save_pretrained(tmp_path / "out")
    for folder in ("out", ".out.incomplete"):
        AutoModelForCausalLM.from_pretrained(tmp_path / folder)


def test_sharded_checkpoint_loads(factored: Any, tmp_path: Path) -> None:
    factored.save_pretrained(tmp_path / "out", max_shard_size="2MB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, factored(ids).logits)


def test_push_to_hub_is_refused_with_the_way_to_do_it(factored: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hf upload"):
        factored.save_pretrained(tmp_path / "out", push_to_hub=True)


def test_a_file_in_the_way(factored: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="is a file"):
        factored.save_pretrained(tmp_path / "out")


def test_recipe_as_given_loads_again(factored: Any, tmp_path: Path) -> None:
    from llmcompressor.recipe import Recipe

    factored.save_pretrained(tmp_path / "out")
    recipe = Recipe.create_instance(str(tmp_path / "out" / "recipe_as_given.yaml"))
    (stage,) = recipe.modifiers
    assert stage.rank.fixed == 32 and stage.layers.select == [5] and stage.mlflow is False


def test_layout_is_in_the_config(factored: Any, tmp_path: Path) -> None:
    factored.save_pretrained(tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "cur" and section["version"] == 1
    assert section["modules"]["model.layers.5.self_attn.q_proj"] == {
        "form": "cur",
        "rank": 32,
        "in_features": 256,
        "out_features": 256,
        "bias": True,
    }


def test_a_dense_model_saves_as_ever(tiny: PreTrainedModel, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "schema version 99.*Upgrade"),
        ({"rank": 7}, r"has shape \(32, 256\); config.json gives rank 7"),
        ({"in_features": 999}, r"has shape \(32, 256\);.*so \(32, 999\)"),
        ({"in_features": 255, "rank": 32}, r"so \(32, 255\)"),
        ({"name": "model.layers.99.self_attn.q_proj"}, "is missing from the checkpoint"),
        ({"form": "id"}, "id_s.weight is missing"),
    ],
)
def test_config_that_disagrees_is_refused(
    factored: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    factored.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    section = config["quantization_config"]
    name = "model.layers.5.self_attn.q_proj"
    if "version" in change:
        section |= change
    elif "name" in change:
        section["modules"][change["name"]] = section["modules"].pop(name)
    else:
        section["modules"][name] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemaError, match=message):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_model_of_another_shape_is_refused(factored: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    factored.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["hidden_size"] = 320
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemaError, match="is 512x256, but the model builds it as 512x320"):
        AutoModelForCausalLM.from_pretrained(out)
