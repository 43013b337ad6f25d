"""A tokenizer of whole words and encoders of random weights: small, but real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = ("good", "bad", "a", "the", "film", "is", "?", ".", *(f"w{number}" for number in range(80)))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def real_data() -> Path:
    """The folder of published files; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}")
    return SHARED


def word_tokenizer(max_length: int = 64) -> Any:
    """A token a word, in the frame of BERT: [CLS] text [SEP] text [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def encoder(head: str, labels: Sequence[str] = (), seed: int = 0) -> Any:
    """A BERT of two narrow layers with a head: ``ForSequenceClassification`` or others."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        architectures=[f"Bert{head}"],
    )
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    return getattr(transformers, f"Bert{head}")(config).eval()


def put_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def put_squad(path: Path, articles: int = 5, unanswerable: bool = False) -> None:
    """Questions about articles whose context is a row of words; each answer is one word of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = []
    for article in range(articles):
        words = [f"w{(7 * article + number) % 80}" for number in range(40)]
        context = " ".join(words)
        asked: list[dict[str, Any]] = [
            {
                "id": f"{article}-{number}",
                "question": f"the {words[number]} ?",
                "answers": [{"text": words[number], "answer_start": context.index(words[number])}],
            }
            for number in (3, 20)
        ]
        if unanswerable:
            asked.append({"id": f"{article}-none", "question": "is good ?", "answers": []})
        paragraph = {"context": context, "qas": asked}
        data.append({"title": f"article {article}", "paragraphs": [paragraph]})
    path.write_text(json.dumps({"version": "1.1", "data": data}))
