"""Models, data and runs that the integration tests share: the real libraries, nothing mocked."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from support import CORES

os.environ.setdefault("OMP_NUM_THREADS", str(CORES))  # for processes that tests start

import torch
from datasets import Dataset
from llmcompressor import oneshot
from loguru import logger
from support import NO_PROCESSOR, Compress, recipe_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import cur_modifier  # noqa: F401 - registers the stage and the quantizer
from cur_modifier.data import calibration_dataset
from tools.minilm import minilm as fetch_minilm
from tools.smollm2 import smollm2 as fetch_smollm2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where files run side by side, those that take long first: none is left over for one process
    at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: "slow" not in item.keywords)  # stable


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(CORES)


@pytest.fixture(autouse=True)
def _own_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test writes to the user's MLflow store, nor to another test's."""
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's measurements."""
    monkeypatch.setenv("CUR_MODIFIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _own_log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that lowers the level for its own process lowers no later test's children's."""
    monkeypatch.setenv("LLM_COMPRESSOR_LOG_LEVEL", "INFO")


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What is logged during the test, as text."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    with contextlib.suppress(ValueError):  # llm-compressor may have reset all sinks
        logger.remove(sink)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct, float32."""
    return fetch_smollm2()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Directory of all-MiniLM-L6-v2, float32."""
    return fetch_minilm()


@pytest.fixture(scope="session")
def reference_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CPython's own reference topics as one text file: real text without a network."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text("\n\n".join(topics[key] for key in sorted(topics)))
    return path


@pytest.fixture(scope="session")
def smollm2_data(smollm2: Path, reference_text: Path) -> Dataset:
    """A little calibration data for SmolLM2."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return calibration_dataset(reference_text, tokenizer, samples=4, sequence_length=128)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of the usual shape with random weights: 13 layers, grouped-query attention,
    biases."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=13,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("tiny") / "model"
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


def _random_data(low: int, high: int) -> Dataset:
    """Eight windows of tokens from ``low`` to below ``high``."""
    ids = torch.randint(low, high, (8, 64), generator=torch.Generator().manual_seed(1))
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )


@pytest.fixture(scope="session")
def tiny_data() -> Dataset:
    """Random tokens for the tiny model."""
    return _random_data(0, 512)


@pytest.fixture(scope="session")
def random_tokens() -> Dataset:
    """Random tokens for the models in architectures.py."""
    return _random_data(3, 1024)


@pytest.fixture(scope="session")
def random_prompt() -> list[int]:
    """A prompt for the models in architectures.py, longer than their sliding windows."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 1024, (120,), generator=generator).tolist()


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Any:
    """A fresh tiny model."""
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="session")
def compress(tiny_data: Dataset) -> Compress:
    """``compress(model, cur={...}, then={...})``: oneshot with a CUR stage and followers."""

    def run(
        model: Any, cur: dict[str, Any], then: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        recipe = recipe_text(cur, then, first=kwargs.pop("recipe_first", None))
        kwargs = {"dataset": tiny_data, "processor": NO_PROCESSOR, **kwargs}
        return oneshot(model=model, recipe=recipe, **kwargs)

    return run


@pytest.fixture(scope="session")
def bench_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the benchmarks: a Llama with random weights, biases and grouped-query attention, whose
    widths are multiples of 64 where they are inputs; a token is a byte."""
    path = tmp_path_factory.mktemp("bench") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
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
    end = alphabet[-1]  # lm-eval puts it before a text
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bench_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random letters under the names of the benchmarks' texts, as many as protocol P needs."""
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
