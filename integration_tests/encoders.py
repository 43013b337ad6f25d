"""A small encoder with its tokenizer, and tasks that it can learn in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("good", "bad", "which", "film", *(f"w{number}" for number in range(60)))


def put_encoder(path: Path, architecture: str = "BertModel", **fields: Any) -> Path:
    """A BERT of two narrow layers with random weights, and a tokenizer of whole words."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        **fields,
    )
    getattr(transformers, architecture)(config).save_pretrained(path)
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL},
    ).save_pretrained(path)
    return path


def put_tasks(folder: Path) -> Path:
    """SST-2 in which one word decides, and SQuAD of one file."""

    def lines(name: str, count: int, first: int) -> None:
        rows = [
            {
                "sentence": f"w{i % 60} w{i % 7} {'good' if i % 3 else 'bad'}",
                "label": int(i % 3 > 0),
            }
            for i in range(first, first + count)
        ]
        path = folder / "glue" / "sst2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("train.jsonl", 200, 0)
    lines("validation.jsonl", 40, 300)
    data = []
    for article in range(10):
        words = [f"w{(article + 3 * number) % 60}" for number in range(12)]
        context = " ".join(words)
        answer = {"text": words[5], "answer_start": context.index(words[5])}
        asked = {"id": str(article), "question": f"which {words[5]}", "answers": [answer]}
        data.append({"title": str(article), "paragraphs": [{"context": context, "qas": [asked]}]})
    (folder / "squad").mkdir()
    (folder / "squad" / "xquad.en.json").write_text(json.dumps({"data": data}))
    return folder
