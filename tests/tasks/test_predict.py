"""Batches change no output, and come in the order that was asked."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from cur_modifier.tasks.predict import predict

from .shared import encoder, word_tokenizer

pytest.importorskip("transformers")


def inputs(count: int) -> list[dict[str, list[int]]]:
    draw = random.Random(0)
    tokenizer = word_tokenizer()
    texts = [
        " ".join(f"w{draw.randrange(80)}" for _ in range(draw.randint(1, 20))) for _ in range(count)
    ]
    return [dict(tokenizer(text)) for text in texts]


def ask(model: Any, rows: list[dict[str, list[int]]], batch_size: int) -> list[torch.Tensor]:
    found = predict(
        model,
        word_tokenizer(),
        rows,
        outputs=("logits",),
        batch_size=batch_size,
        description="test",
    )
    return [row for (row,) in found]


def test_a_batch_gives_what_one_by_one_gives() -> None:
    model, rows = encoder("ForSequenceClassification"), inputs(11)
    one = ask(model, rows, 1)
    for row, found in zip(rows, one, strict=True):
        direct = model(**{name: torch.tensor([ids]) for name, ids in row.items()}).logits[0]
        torch.testing.assert_close(found, direct)
    torch.testing.assert_close(torch.stack(ask(model, rows, 4)), torch.stack(one))


def test_batches_are_of_one_length_the_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = encoder("ForSequenceClassification"), inputs(12)
    shapes = []
    forward = model.forward

    def watch(**given: torch.Tensor) -> Any:
        shapes.append(given["input_ids"].shape)
        return forward(**given)

    monkeypatch.setattr(model, "forward", watch)
    ask(model, rows, 4)
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    assert shapes == [(4, lengths[0]), (4, lengths[4]), (4, lengths[8])]


def test_a_broken_model_is_named() -> None:
    model = encoder("ForSequenceClassification")
    torch.nn.init.constant_(model.classifier.bias, torch.nan)
    with pytest.raises(ValueError, match=r"test: the model's logits are not finite.*dtype"):
        ask(model, inputs(2), 2)
