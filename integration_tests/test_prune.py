"""Removal of neurons and heads through everything: recipe, checkpoint, loading, later stages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from llmcompressor import oneshot
from support import NO_PROCESSOR, thorough
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

PROMPT = torch.arange(40, 88)[None]
QUICK: dict[str, Any] = {"sensitivity": {"samples": 4}, "mlflow": False}
GPTQ = {
    "GPTQModifier": {
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 64,
                },
            }
        },
    }
}
ATTENTION_AS_IDS = {
    "CURModifier": {
        "targets": ["re:.*(q|k|v|o)_proj$"],
        "form": "id",
        "rank": {"ratio": 0.7},
        "layers": {"select": "all"},
        "mlflow": False,
    }
}
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of a Llama with grouped queries and biases: large enough for groups of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():  # what an MLP is worth differs
        for layer, scale in zip(model.model.layers, (0.3, 1.0, 3.0), strict=True):
            layer.mlp.down_proj.weight *= scale
    path = tmp_path_factory.mktemp("llama") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture
def llama(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def stages(prune: dict[str, Any], *later: dict[str, Any], first: Any = None) -> str:
    groups: dict[str, Any] = {"first_modifiers": first} if first else {}
    groups["prune_modifiers"] = {"IDPruningModifier": {**QUICK, **prune}}
    groups |= {f"later{number}_modifiers": stage for number, stage in enumerate(later)}
    return yaml.safe_dump({"compress_stage": groups}, sort_keys=False)


def pruned(model: Any, data: Dataset, prune: dict[str, Any], *later: Any, first: Any = None) -> Any:
    text = stages(prune, *later, first=first)
    return oneshot(model=model, dataset=data, recipe=text, processor=NO_PROCESSOR)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        out = model(PROMPT % model.config.vocab_size)
    return out.logits if hasattr(out, "logits") else out[0]


def saved(model: Any, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder, save_compressed=True)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("prune", "neurons", "heads"),
    [
        ({"budget": {"ratio": 0.8}}, 128, 2),
        ({"units": ["neurons", "heads"], "budget": {"macs": 0.6}}, None, None),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in [
                ({"budget": {"ratio": 0.8, "by": "uniform"}, "multiple_of": 16}, 176, 2),
                ({"units": ["heads"], "budget": {"ratio": 0.9}}, 256, 1),
                ({"budget": {"parameters": 0.9}, "anchor": None, "fit": "gram"}, None, 2),
                ({"budget": {"ratio": 0.8}, "refine": {"epochs": 1}}, 128, 2),
            ]
        ),
    ],
)
def test_uniform_shapes_are_an_ordinary_checkpoint(
    llama: Any,
    tiny_data: Dataset,
    tmp_path: Path,
    prune: dict[str, Any],
    neurons: int | None,
    heads: int | None,
) -> None:
    model = pruned(llama, tiny_data, prune)
    config = saved(model, tmp_path / "out")
    assert "quantization_config" not in config and "auto_map" not in config
    assert "transformers_weights" not in config and not (tmp_path / "out" / "cur_code").exists()
    if neurons is not None:
        assert config["intermediate_size"] == neurons
    if heads is not None:
        assert config["num_key_value_heads"] == heads
        assert config["num_attention_heads"] == 2 * heads
    script = (  # a process that has never heard of us
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        f"model = M.from_pretrained({str(tmp_path / 'out')!r}).eval()\n"
        "torch.save(model(torch.arange(40, 88)[None]).logits, sys.argv[1])\n"
        "assert 'cur_modifier' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "l.pt")], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "l.pt"), logits(model), rtol=1e-5, atol=1e-5)


def test_a_pruned_model_quantizes_as_a_dense_one(
    llama: Any, tiny_data: Dataset, tmp_path: Path
) -> None:
    model = pruned(llama, tiny_data, {"budget": {"ratio": 0.8}}, GPTQ)
    config = saved(model, tmp_path / "out")
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["intermediate_size"] == 128 and "auto_map" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [False, True])
def test_removal_and_row_ids_stack_in_either_order(
    llama: Any, tiny_data: Dataset, tmp_path: Path, first: bool
) -> None:
    prune = {"budget": {"ratio": 0.85}, "shapes": "free"}
    if first:
        model = pruned(llama, tiny_data, prune, first=ATTENTION_AS_IDS)
    else:
        model = pruned(llama, tiny_data, prune, ATTENTION_AS_IDS)
    config = saved(model, tmp_path / "out")
    section = config["quantization_config"]
    assert len(section["modules"]) == 4 * 3 and section["resized"]
    assert {"report.html", "report-2.html"} <= {p.name for p in (tmp_path / "out").iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_free_shapes_spend_the_budget_and_load_with_what_they_ship(
    llama: Any, tiny_data: Dataset, tmp_path: Path
) -> None:
    before = sum(p.numel() for layer in llama.model.layers for p in layer.parameters())
    model = pruned(llama, tiny_data, {"budget": {"ratio": 0.75}, "shapes": "free"}, GPTQ)
    counts = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert len(set(counts)) > 1 and all(count % 64 == 0 for count in counts)
    config = saved(model, tmp_path / "out")
    after = before - sum(3 * 128 * (256 - c) for c in counts)
    assert 0.65 < after / before <= 0.75
    assert config["quantization_config"]["version"] == 2
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        f"model = M.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True).eval()\n"
        "torch.save(model(torch.arange(40, 88)[None]).logits, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "l.pt")], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "l.pt"), logits(model), rtol=1e-4, atol=1e-4)


OTHERS: dict[str, Any] = {
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64, activation_function="relu")
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_embd=64, n_layer=3, n_head=4, n_positions=128)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=128)),
    "bert": lambda: BertModel(BertConfig(**SMALL, intermediate_size=128)),
    "bert_classifier": lambda: BertForSequenceClassification(
        BertConfig(**SMALL, intermediate_size=128, num_labels=3)
    ),
    "roberta_regression": lambda: RobertaForSequenceClassification(
        RobertaConfig(**SMALL, intermediate_size=128, num_labels=1, pad_token_id=0)
    ),
    "distilbert_spans": lambda: DistilBertForQuestionAnswering(
        DistilBertConfig(
            vocab_size=512, dim=64, hidden_dim=128, n_layers=3, n_heads=4,
            max_position_embeddings=128,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("shapes", ["free", *thorough("uniform")])
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_and_heads(
    name: str, shapes: str, tiny_data: Dataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = OTHERS[name]()
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1 or key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "dense")
    model = type(model).from_pretrained(tmp_path / "dense")
    units = ["neurons"] if shapes == "uniform" else ["neurons", "heads"]
    prune = {
        "units": units,
        "shapes": shapes,
        "budget": {"ratio": 0.7},
        "multiple_of": 16,
        "served": False,
    }
    model = pruned(model, tiny_data, prune)
    config = saved(model, tmp_path / "out")
    assert ("quantization_config" in config) == (shapes == "free")
    loaded = type(model).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_labels_make_the_loss_the_task_s(tiny_data: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    OTHERS["bert_classifier"]().save_pretrained(tmp_path / "dense")
    # A list of one: llm-compressor's collator takes the length of every column.
    labelled = tiny_data.add_column("labels", [[number % 3] for number in range(len(tiny_data))])
    counts = []
    for data in (tiny_data, labelled):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
        budget = {"ratio": 0.7}
        prune = {"shapes": "free", "budget": budget, "multiple_of": 2, "served": False}
        model = pruned(model, data, prune)
        layers = model.bert.encoder.layer
        counts.append([layer.output.dense.weight.clone() for layer in layers])
    assert any(
        one.shape != other.shape or not torch.equal(one, other)
        for one, other in zip(*counts, strict=True)
    )


@pytest.mark.parametrize(
    ("prune", "later", "message"),
    [
        ({"budget": {"ratio": 0.2}}, [], r"allows \d+ of \d+ parameters, .* Raise the budget"),
        ({"multiple_of": 300}, [], "multiple_of 300 leaves no choice .* Use 16 or less"),
        ({"multiple_of": 16}, [GPTQ], "takes 64 inputs of .*down_proj together.*multiple of 64"),
        ({"targets": ["re:.*nothing$"]}, [], "match no consumer .*down_proj"),
        ({"targets": [r"re:.*layers\.[1-9]\..*"]}, [], "one number for all layers.*shapes: free"),
        (
            {"units": ["heads"], "shapes": "free"},
            [],
            "one cache of keys and values.*shapes: uniform.*served: false",
        ),
        (
            {},
            [{"CURModifier": {"targets": ["re:.*nothing$"], "layers": {"select": "all"}}}],
            "re:.*nothing.*matches no Linear",
        ),
        (
            {},
            [ATTENTION_AS_IDS, {"CURHealModifier": {"batch_size": 1000}}],
            "batch_size 1000 is more than",
        ),
    ],
)
def test_bad_input_is_refused_before_the_calibration(
    llama: Any,
    tiny_data: Dataset,
    prune: dict[str, Any],
    later: list[Any],
    message: str,
    log: list[str],
) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pruned(llama, tiny_data, prune, *later)
    assert not any("Measuring" in line for line in log)
    assert llama.model.layers[0].mlp.down_proj.in_features == 256


def test_units_of_factored_modules_are_refused_with_the_remedy(
    llama: Any, tiny_data: Dataset
) -> None:
    everything = {
        "CURModifier": ATTENTION_AS_IDS["CURModifier"] | {"targets": ["re:.*(gate|up|down)_proj$"]}
    }
    with pytest.raises(ValueError, match="put IDPruningModifier before CURModifier"):
        pruned(llama, tiny_data, {"budget": {"ratio": 0.8}}, first=everything)


def test_units_of_a_quantized_checkpoint_are_refused(
    llama: Any, tiny_data: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is quantized: remove units first"):
        pruned(llama, tiny_data, {"budget": {"ratio": 0.8}}, first=GPTQ)


def test_a_second_run_takes_ordinary_checkpoints(
    llama: Any, tiny_data: Dataset, tmp_path: Path
) -> None:
    """And says of others that it does not: llm-compressor puts its saving around a model's."""
    half = {"budget": {"ratio": 0.8}, "multiple_of": 32}
    saved(pruned(llama, tiny_data, half), tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    saved(pruned(again, tiny_data, half | {"shapes": "free"}), tmp_path / "twice")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert loaded.num_parameters() < again.num_parameters() + 1
    with pytest.raises(ValueError, match=r"already quantized in a different format \(cur\)"):
        pruned(loaded, tiny_data, half)
    loaded.save_pretrained(tmp_path / "thrice")  # as before that
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "thrice")
    assert torch.equal(logits(back), logits(loaded))


def test_without_data_nothing_is_removed(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"no calibration data.*dataset="):
        oneshot(model=llama, recipe=stages({}), processor=NO_PROCESSOR)
