"""The quality benchmark as it runs, protocol and all, on a tiny model and random text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from quality.__main__ import main
from quality.calibration import input_statistics, projections
from quality.methods import METHODS
from quality.protocol import calibration_windows, evaluation_windows
from quality.results import read_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

LAYERS = 3  # too few for CURing's ten


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, biases and grouped-query attention; a token is a byte."""
    path = tmp_path_factory.mktemp("quality") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random letters under the names of the texts, as many as the protocol needs."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def text(length: int, letters: str) -> str:
        return "".join(draw.choices(letters, k=length))

    (folder / "wikitext2-raw").mkdir()
    (folder / "wikitext2-raw" / "wiki.test.raw").write_text(text(25_000, "test"))
    (folder / "wikitext2-raw" / "wiki.valid.raw").write_text(
        text(70_000, "calibrate") + text(70_000, "HELD OUT")
    )
    (folder / "c4").mkdir()
    documents = [text(140, "first" if i < 500 else "LAST") for i in range(1000)]
    (folder / "c4" / "c4_en_train_first1000.jsonl").write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in documents)
    )
    return folder


@pytest.fixture
def run(tiny: Path, data: Path, tmp_path: Path) -> Any:
    """The command with the tiny model; gives its exit status and its rows."""
    output = tmp_path / "quality.json"

    def command(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        status = main([f"--model={tiny}", f"--data={data}", f"--output={output}", *arguments])
        return status, read_rows(output)

    return command


def test_texts_are_those_of_the_protocol(tiny: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def letters(windows: torch.Tensor) -> set[str]:
        return set(tokenizer.decode(windows.flatten())) - set("\n")

    calibration = {n: calibration_windows(n, data, tokenizer) for n in ("wikitext", "c4")}
    evaluation = evaluation_windows(data, tokenizer)
    held_out = evaluation_windows(data, tokenizer, held_out=True)
    assert {n: tuple(w.shape) for n, w in calibration.items()} == {
        "wikitext": (64, 1024),
        "c4": (64, 1024),
    }
    assert {n: tuple(w.shape) for n, w in (evaluation | held_out).items()} == {
        "wikitext": (24, 1024),
        "c4": (24, 1024),
        "held_out": (8, 1024),
    }
    assert {n: letters(w) for n, w in calibration.items()} == {
        "wikitext": set("calibrate"),
        "c4": set("first"),
    }
    assert {n: letters(w) for n, w in (evaluation | held_out).items()} == {
        "wikitext": set("test"),
        "c4": set("LAST"),
        "held_out": set("HELD OUT"),
    }


def test_statistics_are_those_of_what_every_projection_reads(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    windows = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(1))
    statistics = input_statistics(model, windows)
    read: dict[str, torch.Tensor] = {}
    for name, linear in projections(model).items():
        linear.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    assert set(read) == set(statistics) and len(read) == 7 * LAYERS
    for name, x in read.items():
        rows = x.flatten(0, -2)
        torch.testing.assert_close(statistics[name].gram, rows.mT @ rows / len(rows))
        torch.testing.assert_close(statistics[name].mean_abs, rows.abs().mean(dim=0))


@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if not method.own_ratio])
def test_every_method_reaches_its_ratio(name: str, tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    windows = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        dense = model(windows).logits
    ratio = METHODS[name].compress(model, windows, 0.7)
    assert 0.6 < ratio <= 0.7  # ranks are whole numbers, and these matrices are small
    with torch.no_grad():
        compressed = model(windows).logits
    assert torch.isfinite(compressed).all() and not torch.allclose(compressed, dense)


def test_rows_are_measured_kept_and_measured_again(
    run: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    some = ("--methods=dense,svd-llm", "--calibrations=c4")
    status, rows = run(*some, "--ratios=0.8")
    assert status == 0
    assert [(r["method"], r["ratio"], r["calibration"]) for r in rows] == [
        ("dense", None, "c4"),
        ("svd-llm", 0.8, "c4"),
    ]
    for row in rows:
        assert list(row) == [
            "method",
            "ratio",
            "calibration",
            "ppl_wikitext",
            "ppl_c4",
            "stored_ratio",
            "seconds",
            "peak_rss_bytes",
        ]
        assert 200 < row["ppl_wikitext"] < 350 and 200 < row["ppl_c4"] < 350  # 256 at random
        assert row["peak_rss_bytes"] > 10**8
    assert rows[0]["stored_ratio"] == 1 and 0.7 < rows[1]["stored_ratio"] <= 0.8

    status, more = run(*some, "--ratios=0.8,0.6")
    assert status == 0 and more[:2] == rows and more[2]["ratio"] == 0.6
    assert "1 rows to measure, 2 in" in capfd.readouterr().out

    status, again = run(*some, "--ratios=0.6", "--methods=svd-llm", "--again")
    assert [r["ratio"] for r in again] == [None, 0.8, 0.6]
    assert again[2]["ppl_c4"] == more[2]["ppl_c4"] and again[2]["seconds"] != more[2]["seconds"]


def test_one_that_fails_leaves_the_others(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    status, rows = run("--methods=curing,svd", "--ratios=0.8", "--calibrations=c4", "--held-out")
    assert status == 1
    assert [row["method"] for row in rows] == ["svd"]
    assert "ppl_held_out" in rows[0] and "ppl_wikitext" not in rows[0]
    printed = capfd.readouterr()
    assert "ValueError: layers.count is 10, but the model has" in printed.err
    assert "failed: its process ended with status 1" in printed.out
    assert printed.out.splitlines()[-1].endswith("same command: curing, calibrated on c4")
