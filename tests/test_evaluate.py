"""Perplexity against its definition, on models whose answer is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cur_modifier.evaluate import main, perplexity, perplexity_of


class Known(nn.Module):
    """Gives the same logits after every token."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_uniform_model_has_the_size_of_the_vocabulary() -> None:
    result = perplexity(Known(torch.zeros(50)), torch.randint(0, 50, (3, 20)))
    assert result.perplexity == pytest.approx(50)
    assert result.tokens == 3 * 19 and result.windows == 3 and result.sequence_length == 20


def test_known_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.25])
    windows = torch.tensor([[2, 0, 0, 1], [2, 1, 0, 0]])  # the first token is context only
    expected = math.exp(-(4 * math.log(0.5) + 2 * math.log(0.25)) / 6)
    assert perplexity(Known(probabilities.log()), windows).perplexity == pytest.approx(expected)


def test_a_broken_model_is_named() -> None:
    with pytest.raises(ValueError, match="log-likelihood is not finite"):
        perplexity(Known(torch.full((5,), math.nan)), torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--windows=0"], "--windows 0: at least 1 is needed"),
        (["--sequence-length=1"], "--sequence-length 1: at least 2 is needed"),
        (["--text=/nowhere/text.txt"], "evaluate: no file or folder '/nowhere/text.txt'"),
    ],
)
def test_bad_arguments_end_without_a_traceback(
    change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["model", "--text=x", *change])
    assert message in f"{capsys.readouterr().err}{stopped.value.code}"


@given(count=st.integers(1, 5), length=st.integers(2, 9), data=st.data())
def test_every_token_but_the_first_is_scored_once(
    count: int, length: int, data: st.DataObject
) -> None:
    """Windows that overlap: token i has log-likelihood -i, so the mean tells which were scored."""
    stride = data.draw(st.integers(1, length - 1))
    total = (count - 1) * stride + length
    windows = torch.arange(total).unfold(0, length, stride)
    result = perplexity_of(lambda window: -window[1:].double(), windows, stride=stride)
    assert result.tokens == total - 1
    assert math.log(result.perplexity) == pytest.approx(sum(range(1, total)) / (total - 1))
