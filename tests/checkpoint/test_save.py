"""A saved checkpoint is whole, says what is factored, and leaves what is not its own alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cur_modifier.checkpoint.remote_code import FOLDER
from cur_modifier.checkpoint.save import TRIPWIRE, annotate, schema_of, wrap_save_pretrained
from cur_modifier.forms.row_id import RowIDLinear, load_shared, shared_skeleton
from cur_modifier.forms.schema import Schema, checksum
from cur_modifier.linalg import interpolative, split_rows

UP = "model.layers.0.mlp.up_proj"


def row_id_of(linear: torch.nn.Linear, rank: int = 6) -> RowIDLinear:
    return RowIDLinear.from_factors(interpolative(linear.weight.detach(), rank))


@pytest.fixture
def model(small_llama: Callable[..., Any]) -> Any:
    model = small_llama(0, num_hidden_layers=1)
    model.set_submodule(UP, row_id_of(model.get_submodule(UP)))
    return model


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    wrap_save_pretrained(model)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_schema_describes_every_factored_module(model: Any) -> None:
    schema = schema_of(model)
    [(name, spec)] = schema.modules.items()
    assert name == UP and (spec.form, spec.rank, spec.bias) == ("id", 6, False)
    assert (spec.out_features, spec.in_features) == (24, 16) and spec.direct_outputs is None
    assert schema.producer.name == "cur_modifier"


def test_a_shared_skeleton_is_written_once_and_named(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    weights = [attention.get_submodule(n).weight.detach() for n in ("q_proj", "k_proj")]
    sizes = [len(W) for W in weights]
    parts = split_rows(interpolative(torch.cat(weights), 8), sizes)
    layers = shared_skeleton(16, sizes, 8, [part.direct_outputs for part in parts])
    load_shared(layers, parts)
    attention.q_proj, attention.k_proj = layers
    modules = schema_of(model).modules
    base = "model.layers.0.self_attn"
    assert modules[f"{base}.k_proj"].shared_skeleton == f"{base}.q_proj"
    assert modules[f"{base}.q_proj"].shared_skeleton is None
    assert sum(modules[f"{base}.{n}"].direct_outputs or 0 for n in ("q_proj", "k_proj")) == 8
    attention.q_proj = layers[0].to_dense()
    with pytest.raises(ValueError, match=r"k_proj uses the skeleton of a layer that was taken out"):
        schema_of(model)


def test_unfitted_factors_are_refused_before_anything_is_written(
    model: Any, tmp_path: Path
) -> None:
    wrap_save_pretrained(model)
    model.get_submodule(UP).stand_in(torch.nn.Linear(16, 24))
    with pytest.raises(ValueError, match=rf"{UP} has no fitted factors yet.*Run oneshot"):
        model.save_pretrained(tmp_path / "saved")
    assert names(tmp_path) == set()


def test_config_says_what_every_reader_needs(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    schema = Schema.read(config["quantization_config"])
    assert schema.files == {"model.safetensors": checksum(saved / "model.safetensors")}
    assert config["transformers_weights"] == TRIPWIRE and not (saved / TRIPWIRE).exists()
    reference = config["auto_map"]["AutoModelForCausalLM"]
    path, _, name = reference.rpartition(".")
    assert (saved / f"{path}.py").is_file() and name == "LlamaForCausalLM"
    assert (saved / FOLDER / "row_id.py").is_file()


def test_annotating_twice_keeps_what_compressed_tensors_wrote(saved: Path, model: Any) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["compressed_tensors"] = {"quant_method": "compressed-tensors"}
    (saved / "config.json").write_text(json.dumps(config))
    annotate(saved, schema_of(model), type(model))
    again = json.loads((saved / "config.json").read_text())
    assert again == config


def test_a_model_of_other_code_ships_none_of_ours(saved: Path, model: Any) -> None:
    class Remote(type(model)):  # type: ignore[misc]
        pass

    config = json.loads((saved / "config.json").read_text())
    del config["auto_map"]
    (saved / "config.json").write_text(json.dumps(config))
    annotate(saved, schema_of(model), Remote)
    assert "auto_map" not in json.loads((saved / "config.json").read_text())


def test_a_second_save_takes_the_place_of_the_first(saved: Path, model: Any) -> None:
    (saved / "tokenizer.json").write_text("{}")
    (saved / "model-00001-of-00002.safetensors").write_text("an earlier save's")
    (saved / "cur_layout.py").write_text("an earlier version's")
    expected = names(saved) - {"model-00001-of-00002.safetensors", "cur_layout.py"}
    model.save_pretrained(saved)
    assert names(saved) == expected and "tokenizer.json" in expected
    assert names(saved.parent) == {"saved"}


def test_an_error_leaves_the_first_save(saved: Path, model: Any) -> None:
    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    (saved.parent / ".saved.incomplete").mkdir()  # of a save that was killed
    with pytest.raises(TypeError):
        model.save_pretrained(saved, max_shard_size=object())
    assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before
    assert names(saved.parent) == {"saved"}


def test_files_that_stages_bring_are_numbered_where_they_differ(model: Any, tmp_path: Path) -> None:
    first = {"report.html": "one", "recipe.yaml": "same"}
    wrap_save_pretrained(model, first)
    wrap_save_pretrained(model, {"report.html": "two", "recipe.yaml": "same"})
    wrap_save_pretrained(model, {"report.html": "three"})
    first["late.txt"] = "read when the model is saved"
    model.save_pretrained(tmp_path / "saved")
    brought = {
        n: (tmp_path / "saved" / n).read_text()
        for n in names(tmp_path / "saved")
        if n.endswith((".html", ".yaml", ".txt"))
    }
    assert brought == {
        "report.html": "one",
        "report-2.html": "two",
        "report-3.html": "three",
        "recipe.yaml": "same",
        "late.txt": "read when the model is saved",
    }


def test_places_that_can_hold_no_checkpoint_are_refused(model: Any, tmp_path: Path) -> None:
    wrap_save_pretrained(model)
    with pytest.raises(ValueError, match=r"push_to_hub=True .*hf upload"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; give save_pretrained a directory"):
        model.save_pretrained(tmp_path / "file")
