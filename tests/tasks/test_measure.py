"""The whole way from examples to metrics, on models whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from cur_modifier.tasks.examples import Answer, Example, Question
from cur_modifier.tasks.measure import measure_task
from cur_modifier.tasks.table import TASKS

from .shared import encoder, word_tokenizer

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
TOKENIZER = word_tokenizer()


def values(task: str, model: Any, examples: Sequence[Any], batch_size: int = 3) -> dict[str, float]:
    found = measure_task(TASKS[task], model, TOKENIZER, examples, batch_size=batch_size)
    return {score.name: score.value for score in found}


def test_accuracy_is_that_of_the_model() -> None:
    model = encoder("ForSequenceClassification", ("negative", "positive"), seed=1)
    texts = [" ".join(f"w{(5 * i + j) % 80}" for j in range(1 + i % 7)) for i in range(20)]
    said = [int(model(**TOKENIZER(text, return_tensors="pt")).logits.argmax()) for text in texts]
    examples = [
        Example((text,), label if number % 4 else 1 - label)
        for number, (text, label) in enumerate(zip(texts, said, strict=True))
    ]
    assert values("sst2", model, examples) == {"accuracy": 0.75}


def test_a_model_with_its_labels_in_another_order_scores_the_same() -> None:
    names = ("entailment", "neutral", "contradiction")
    model = encoder("ForSequenceClassification", names, seed=2)
    examples = [Example((f"w{i} w{i + 1}", f"w{3 * i}"), i % 3) for i in range(20)]
    first = values("mnli", model, examples)
    for part in (model.classifier.weight, model.classifier.bias):
        part.data = part.data.flip(0)
    assert values("mnli", model, examples) != first or first["accuracy"] in (0.0, 1.0)
    model.config.id2label = dict(enumerate(reversed(names)))
    assert values("mnli", model, examples) == first


def test_a_score_is_taken_as_it_is() -> None:
    model = encoder("ForSequenceClassification", ("score",))
    texts = [(f"w{i}", f"w{2 * i}") for i in range(12)]
    said = [float(model(**TOKENIZER(*pair, return_tensors="pt")).logits.detach()) for pair in texts]
    lowest, highest = min(said), max(said)
    labels = [5 * (value - lowest) / (highest - lowest) for value in said]
    examples = [Example(pair, label) for pair, label in zip(texts, labels, strict=True)]
    assert values("stsb", model, examples) == pytest.approx({"spearman": 1, "pearson": 1}, abs=1e-4)


class Finder(nn.Module):
    """Answers with the word of the context that is in the question, or with the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.config = encoder("ForQuestionAnswering").config
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(input_ids.shape)
        logits[:, 0] = 1.0
        for row, (ids, types) in enumerate(zip(input_ids, token_type_ids, strict=True)):
            wanted = ids[2]  # [CLS] the WORD ?
            logits[row][(types == 1) & (ids == wanted)] = 2.0
        return {"start_logits": logits, "end_logits": logits}


def test_answers_are_found_over_windows() -> None:
    """A context of 80 words does not fit into the model's 64 tokens."""
    words = [f"w{number}" for number in range(80)]
    context = " ".join(words)
    questions = [
        Question(word, "", f"the {word} ?", context, (Answer(word, context.index(word)),))
        for word in words[::7]
    ]
    assert values("squad", Finder(), questions) == {"exact_match": 1.0, "f1": 1.0}
    none = [Question("none", "", "the film ?", context, ())]
    assert values("squad_v2", Finder(), questions + none) == {"exact_match": 1.0, "f1": 1.0}
    assert values("squad", Finder(), none) == {"exact_match": 0.0, "f1": 0.0}


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a class ...ForQuestionAnswering"):
        values("squad", encoder("ForSequenceClassification"), [])
