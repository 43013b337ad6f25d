"""Models whose layers have lost neurons and heads are saved with the sizes that are left."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from cur_modifier.checkpoint.remote_code import FOLDER
from cur_modifier.checkpoint.resized import Differences, differences, mark_resized
from cur_modifier.checkpoint.save import wrap_save_pretrained
from cur_modifier.forms.row_id import RowIDLinear
from cur_modifier.forms.schema import Schema
from cur_modifier.linalg import interpolative

WIDTH, HEADS, NEURONS = 16, 4, 24
HEAD = WIDTH // HEADS
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_inner": NEURONS}
DISTILBERT = {
    "vocab_size": 64,
    "dim": WIDTH,
    "n_layers": 2,
    "n_heads": HEADS,
    "hidden_dim": NEURONS,
}
# By architecture: the config, the layers, each layer's producers of neurons and their consumer, its
# projections to heads and the one that reads them, and what tells its attention how many there are.
Case = tuple[Any, str, tuple[list[str], str], tuple[list[str], str], dict[str, int]]
CASES: dict[str, Case] = {
    "LlamaForCausalLM": (
        transformers.LlamaConfig(**COMMON, intermediate_size=NEURONS, attention_bias=True),
        "model.layers",
        (["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
        ([f"self_attn.{n}_proj" for n in "qkv"], "self_attn.o_proj"),
        {},
    ),
    "OPTForCausalLM": (
        transformers.OPTConfig(**COMMON, ffn_dim=NEURONS, word_embed_proj_dim=WIDTH),
        "model.decoder.layers",
        (["fc1"], "fc2"),
        ([f"self_attn.{n}_proj" for n in "qkv"], "self_attn.out_proj"),
        {"num_heads": HEADS - 1},
    ),
    "GPT2LMHeadModel": (
        transformers.GPT2Config(**GPT2, n_positions=32),
        "transformer.h",
        (["mlp.c_fc"], "mlp.c_proj"),
        (["attn.c_attn"], "attn.c_proj"),
        {"num_heads": HEADS - 1, "split_size": WIDTH - HEAD},
    ),
    "GPTNeoXForCausalLM": (
        transformers.GPTNeoXConfig(**COMMON, intermediate_size=NEURONS),
        "gpt_neox.layers",
        (["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h"),
        (["attention.query_key_value"], "attention.dense"),
        {},
    ),
    "BertForMaskedLM": (
        transformers.BertConfig(**COMMON, intermediate_size=NEURONS),
        "bert.encoder.layer",
        (["intermediate.dense"], "output.dense"),
        ([f"attention.self.{n}" for n in ("query", "key", "value")], "attention.output.dense"),
        {"num_attention_heads": HEADS - 1, "all_head_size": WIDTH - HEAD},
    ),
    "DistilBertForMaskedLM": (
        transformers.DistilBertConfig(**DISTILBERT, max_position_embeddings=32),
        "distilbert.transformer.layer",
        (["ffn.lin1"], "ffn.lin2"),
        ([f"attention.{n}_lin" for n in "qkv"], "attention.out_lin"),
        {"n_heads": HEADS - 1},
    ),
}
LLAMA = "LlamaForCausalLM"


def build(name: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(copy.deepcopy(CASES[name][0])).eval()


def cut(
    module: Any, *, outputs: torch.Tensor | None = None, inputs: torch.Tensor | None = None
) -> None:
    """Keep those outputs or inputs of a Linear."""
    matrix = module.weight.T if isinstance(module, Conv1D) else module.weight
    bias = module.bias
    if outputs is not None:
        matrix, bias = matrix[outputs], None if bias is None else bias[outputs]
    if inputs is not None:
        matrix = matrix[:, inputs]
    m, n = matrix.shape
    if isinstance(module, Conv1D):
        module.nf, module.nx, matrix = m, n, matrix.T
    else:
        module.out_features, module.in_features = m, n
    module.weight = torch.nn.Parameter(matrix.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        module.bias = torch.nn.Parameter(bias.detach().clone())


def remove_neurons(model: Any, layer: int, kept: int) -> None:
    """Leave the first neurons of a layer."""
    _, layers, (producers, consumer), _, _ = CASES[type(model).__name__]
    block = model.get_submodule(f"{layers}.{layer}")
    for name in producers:
        cut(block.get_submodule(name), outputs=torch.arange(kept))
    cut(block.get_submodule(consumer), inputs=torch.arange(kept))


def remove_head(model: Any, layer: int) -> None:
    """Leave all heads of a layer but the first."""
    _, layers, _, (producers, consumer), integers = CASES[type(model).__name__]
    block = model.get_submodule(f"{layers}.{layer}")
    kept = torch.arange(HEAD, WIDTH)
    for name in producers:
        module = block.get_submodule(name)
        if name.endswith("c_attn"):  # all of q, then k, then v
            outputs = torch.cat([kept + start for start in (0, WIDTH, 2 * WIDTH)])
        elif name.endswith("query_key_value"):  # q, k, v of a head, then the next one's
            outputs = torch.arange(3 * HEAD, 3 * WIDTH)
        else:
            outputs = kept
        cut(module, outputs=outputs)
    cut(block.get_submodule(consumer), inputs=kept)
    for name, value in integers.items():
        attention = block.get_submodule(producers[0].rpartition(".")[0])
        assert type(getattr(attention, name)) is int
        setattr(attention, name, value)


def resized(name: str = LLAMA) -> Any:
    """A model with other numbers of neurons in each layer and of heads in one, ready to save."""
    model = build(name)
    remove_neurons(model, 0, 20)
    remove_neurons(model, 1, 9)
    remove_head(model, 1)
    return ready(model)


def ready(model: Any) -> Any:
    mark_resized(model)
    wrap_save_pretrained(model)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 13)[None]).logits


def section_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    _, layers, neurons, heads, integers = CASES[name]
    model = resized(name)
    dense = build(name)
    assert not torch.allclose(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "first")
    schema = Schema.read(section_of(tmp_path / "first"))
    changed = {f"{layers}.{i}.{n}" for i in (0, 1) for n in (*neurons[0], neurons[1])}
    changed |= {f"{layers}.1.{n}" for n in (*heads[0], heads[1])}
    assert schema.resized.keys() == changed
    assert all(size.transposed == name.startswith("GPT2") for size in schema.resized.values())
    assert list(schema.attributes.values()) == ([integers] if integers else [])

    loaded = type(model).from_pretrained(tmp_path / "first", dtype=torch.float32).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert torch.equal(logits(loaded), logits(model))

    loaded.save_pretrained(tmp_path / "second")
    assert section_of(tmp_path / "second") == section_of(tmp_path / "first")
    again = type(model).from_pretrained(tmp_path / "second", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))


def test_a_continuation_with_a_cache_is_the_same(tmp_path: Path) -> None:
    model = resized()
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    ids = torch.arange(3, 9)[None]
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize(
    ("name", "auto"),
    [(LLAMA, "AutoModelForCausalLM"), ("BertForMaskedLM", "AutoModelForMaskedLM")],
)
def test_loaded_and_saved_with_the_code_that_is_shipped(
    name: str, auto: str, tmp_path: Path
) -> None:
    model = resized(name)
    model.save_pretrained(tmp_path / "saved")
    code = """
import sys
if sys.argv[3] == "without":
    sys.modules["cur_modifier"] = None
else:
    import cur_modifier
import torch
from safetensors.torch import save_file
import transformers
model = getattr(transformers, sys.argv[4]).from_pretrained(
    sys.argv[1], dtype=torch.float32, trust_remote_code=True
)
assert type(model).__module__.startswith("transformers_modules"), type(model)
with torch.no_grad():
    save_file({"logits": model(torch.arange(3, 13)[None]).logits}, sys.argv[2])
try:
    model.save_pretrained(f"{sys.argv[2]}_again")
except ValueError:
    print("refused")
"""
    for plugin in ("with", "without"):
        found = tmp_path / plugin
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "saved"), str(found), plugin, auto],
            capture_output=True,
            text=True,
            env={
                "PATH": "",
                "HF_HOME": str(tmp_path / "cache"),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            },
        )
        assert result.returncode == 0, result.stderr
        assert torch.equal(load_file(found)["logits"], logits(model))
        assert ("refused" in result.stdout) == (plugin == "without")
    again = type(model).from_pretrained(tmp_path / "with_again", dtype=torch.float32).eval()
    assert (
        section_of(tmp_path / "with_again")["resized"] == section_of(tmp_path / "saved")["resized"]
    )
    assert torch.equal(logits(again), logits(model))


def test_factors_of_other_sizes_say_so(tmp_path: Path) -> None:
    model = resized()
    for child, rank in (("up_proj", 6), ("down_proj", 7)):
        linear = model.model.layers[0].mlp.get_submodule(child)
        layer = RowIDLinear.from_factors(interpolative(linear.weight.detach(), rank))
        model.model.layers[0].mlp.set_submodule(child, layer)
    unchanged = "model.layers.0.self_attn.q_proj"
    q = model.get_submodule(unchanged)
    layer = RowIDLinear.from_factors(interpolative(q.weight.detach(), 5), q.bias.detach())
    model.set_submodule(unchanged, layer)
    model.save_pretrained(tmp_path / "saved")
    schema = Schema.read(section_of(tmp_path / "saved"))
    own = {name: module.resized for name, module in schema.modules.items()}
    mlp = "model.layers.0.mlp"
    assert own == {f"{mlp}.up_proj": True, f"{mlp}.down_proj": True, unchanged: False}
    assert f"{mlp}.gate_proj" in schema.resized and f"{mlp}.up_proj" not in schema.resized
    loaded = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), logits(model))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_sizes_that_the_config_tells_make_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = build(LLAMA)
    for layer in (0, 1):
        remove_neurons(model, layer, 20)
    model.config.intermediate_size = 20
    model.save_pretrained(tmp_path / "plain")
    ready(model).save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "plain")


def test_an_ordinary_checkpoint_keeps_nothing_of_one_before(tmp_path: Path) -> None:
    model = build(LLAMA)
    for layer in (0, 1):
        remove_neurons(model, layer, 20)
    ready(model).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / FOLDER).is_dir()
    loaded = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    loaded.config.intermediate_size = 20
    loaded.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not {"quantization_config", "auto_map", "transformers_weights"} & config.keys()
    assert not (tmp_path / "saved" / FOLDER).exists()
    again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))


def test_a_model_that_is_not_marked_is_not_compared(small_llama: Callable[..., Any]) -> None:
    model = small_llama(0, num_hidden_layers=1)
    model.config.intermediate_size = 20
    assert differences(model) == Differences()
    mark_resized(model)
    assert differences(model).dense.keys() == {
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }


def test_integers_of_modules_that_hold_nothing_resized_are_left_out() -> None:
    model = resized("OPTForCausalLM")
    model.model.decoder.layers[0].self_attn.num_heads = 17  # its heads are all there
    found = differences(model).integers
    assert found == {"model.decoder.layers.1.self_attn": {"num_heads": HEADS - 1}}


@pytest.mark.parametrize("name", [LLAMA, "GPT2LMHeadModel"])
def test_what_no_checkpoint_can_record_is_refused(name: str, tmp_path: Path) -> None:
    model = resized(name)
    _, layers, (producers, _), _, _ = CASES[name]
    linear = model.get_submodule(f"{layers}.0.{producers[0]}")
    linear.weight = torch.nn.Parameter(linear.weight.detach()[1:, 1:].clone())
    with pytest.raises(ValueError, match=rf"{producers[0]}\.weight has shape .* Set those, or"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_other_tensors_of_other_shapes_are_refused() -> None:
    model = resized()
    model.model.norm.weight = torch.nn.Parameter(torch.ones(WIDTH - 1))
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight has shape \(15,\).*batch norms only"
    ):
        differences(model)


def test_a_bias_that_came_or_went_is_refused() -> None:
    model = resized("OPTForCausalLM")
    model.model.decoder.layers[0].fc1.bias = None
    with pytest.raises(ValueError, match=r"fc1 has no bias, where the model's config builds one"):
        differences(model)


def without_channels(model: Any) -> Any:
    """Half of the channels inside every block of a ResNet gone."""
    from torch import nn

    for stage in model.resnet.encoder.stages:
        for block in stage.layers:
            first, second = block.layer
            half = first.convolution.out_channels // 2
            for module, side in ((first.convolution, 0), (second.convolution, 1)):
                module.weight = nn.Parameter(module.weight.detach().narrow(side, 0, half).clone())
            first.convolution.out_channels = second.convolution.in_channels = half
            norm = first.normalization
            for key in ("weight", "bias"):
                setattr(norm, key, nn.Parameter(getattr(norm, key).detach()[:half].clone()))
            for key in ("running_mean", "running_var"):
                setattr(norm, key, getattr(norm, key)[:half].clone())
            norm.num_features = half
    return model


@pytest.mark.parametrize("remote", [False, True])
def test_convolutions_and_batch_norms_come_back(
    small_resnet: Callable[..., Any], images: Any, tmp_path: Path, remote: bool
) -> None:
    import transformers

    small_resnet(0).save_pretrained(tmp_path / "dense")
    model = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "dense").eval()
    mark_resized(model)
    assert differences(model) == Differences()
    without_channels(model)
    found = differences(model)
    assert len(found.dense) == 8 and len(found.norms) == 4 and not found.integers
    wrap_save_pretrained(model)
    model.save_pretrained(tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["version"] == 2 and len(section["norms"]) == 4
    with torch.no_grad():
        wanted = model(**images[0]).logits
    if remote:
        torch.save(images[0], tmp_path / "images.pt")
        script = (
            "import sys, torch; from transformers import AutoModelForImageClassification as M\n"
            f"model = M.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True).eval()\n"
            f"batch = torch.load({str(tmp_path / 'images.pt')!r})\n"
            "torch.save(model(**batch).logits.detach(), sys.argv[1])\n"
            "assert 'cur_modifier' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "l.pt")], check=True)
        answer = torch.load(tmp_path / "l.pt")
    else:
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            answer = loaded.eval()(**images[0]).logits
    torch.testing.assert_close(answer, wanted)


def test_a_norm_that_disagrees_with_its_size_is_refused(small_resnet: Callable[..., Any]) -> None:
    model = without_channels(small_resnet(0))
    mark_resized(model)
    norm = model.resnet.encoder.stages[0].layers[0].layer[0].normalization
    norm.num_features = 7
    with pytest.raises(ValueError, match=r"normalization.weight has shape \(4,\).*give \(7,\)"):
        differences(model)
