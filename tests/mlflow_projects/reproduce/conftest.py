"""A small encoder with a head, and padded batches with labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture
def encoder() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        mask = torch.ones(6, 12, dtype=torch.long)
        mask[:3, 8:] = 0
        ids = torch.randint(1, 60, (6, 12), generator=generator) * mask
        labels = torch.randint(0, 2, (6,), generator=generator)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found
