"""Hypothesis draws the same examples on every run: a failure is a defect, never a flicker."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The matrices are tiny: a second thread would only wait for its turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_llama() -> Callable[..., Any]:
    """``small_llama(seed, **fields)``: a Llama of random weights with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int, **fields: Any) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            **fields,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def small_resnet() -> Callable[..., Any]:
    """``small_resnet(seed, **fields)``: two stages of two residual blocks, of random weights, whose
    batch norms have seen something. It takes images of 32 × 32 pixels."""
    from transformers import ResNetConfig, ResNetForImageClassification

    def make(seed: int, **fields: Any) -> Any:
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}
        config = ResNetConfig(**sizes | {"layer_type": "basic", "num_labels": 5} | fields)
        model = ResNetForImageClassification(config).train()
        with torch.no_grad():
            for _ in range(30):
                model(torch.randn(16, 3, 32, 32))
        return model.eval()

    return make


@pytest.fixture
def images() -> list[dict[str, torch.Tensor]]:
    """Calibration batches of images."""
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)} for _ in range(6)]


@pytest.fixture
def offloaded_llama(small_llama: Callable[..., Any]) -> Any:
    """Its weights lie on the CPU, and a look at one gives a copy on another device."""
    offload = pytest.importorskip("compressed_tensors.offload")
    model = small_llama(0, tie_word_embeddings=True)
    offload.set_onload_device(model, torch.device("meta"))
    assert model.lm_head.weight.device.type == "meta"
    return model
