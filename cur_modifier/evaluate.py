"""Perplexity, measured the way that others can repeat.

``python -m cur_modifier.evaluate MODEL --text wiki.test.raw`` prints it as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from cur_modifier.data import read_documents, token_windows
from cur_modifier.precision import half_products

__all__ = ["Perplexity", "Scorer", "perplexity", "perplexity_of"]


# A window (length,) of token ids to the log-likelihoods (length - 1,) of all but its first.
Scorer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood of ``tokens`` predicted tokens."""

    perplexity: float
    tokens: int
    windows: int
    sequence_length: int
    stride: int
    seconds: float


def perplexity(
    model: Any, windows: torch.Tensor, *, stride: int | None = None, bfloat16: bool = False
) -> Perplexity:
    """Perplexity of a causal language model on ``windows (count, length)`` of token ids.

    Every window is scored by itself: its first token is context only, no window sees another.

    Args:
        stride: tokens from the start of one window to that of the next; the length if None. Where
            windows overlap, every token is scored once, in the first window that holds it.
        bfloat16: products of a float32 model in bfloat16, where the device has units for it. On
            SmolLM2 that halves the time and moves the result by about 0.01.

    Raises:
        ValueError: the model's output is not finite.
    """
    device = next(model.parameters()).device
    model.eval()

    @torch.no_grad()
    def score(window: torch.Tensor) -> torch.Tensor:
        ids = window[None].to(device)
        with half_products(model.dtype, device) if bfloat16 else nullcontext():
            logits = model(input_ids=ids, use_cache=False).logits
        return -torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), ids[0, 1:], reduction="none"
        )

    return perplexity_of(score, windows, stride=stride)


def perplexity_of(score: Scorer, windows: torch.Tensor, *, stride: int | None = None) -> Perplexity:
    """:func:`perplexity` of whatever gives log-likelihoods, a server among others."""
    started = time.perf_counter()
    count, length = windows.shape
    stride = length if stride is None else stride
    total, tokens = 0.0, 0
    for index, window in enumerate(tqdm(windows, desc="Perplexity", leave=False)):
        new = score(window)[-stride:] if index else score(window)
        total -= float(new.double().sum())
        tokens += len(new)
    if not math.isfinite(total):
        raise ValueError(
            "the model's log-likelihood is not finite: it produces NaN or infinity on this text. "
            "Check its weights and dtype."
        )
    return Perplexity(
        perplexity=math.exp(total / tokens),
        tokens=tokens,
        windows=count,
        sequence_length=length,
        stride=stride,
        seconds=time.perf_counter() - started,
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cur_modifier.evaluate", description="Perplexity of a saved model on a text."
    )
    parser.add_argument("model", help="directory or hub name, dense or factored")
    parser.add_argument("--text", required=True, help=".txt/.raw/.jsonl file, folder, or hub name")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--stride", type=int, help="tokens between windows [their length]")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)

    if options.windows < 1:
        parser.error(f"--windows {options.windows}: at least 1 is needed.")
    if options.sequence_length < 2:
        parser.error(f"--sequence-length {options.sequence_length}: at least 2 is needed.")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        documents = read_documents(options.text)
        windows = token_windows(
            documents,
            AutoTokenizer.from_pretrained(options.model),
            windows=options.windows,
            sequence_length=options.sequence_length,
            stride=options.stride,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate: {error}")
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    )
    if torch.cuda.is_available():
        model.to("cuda")
    print(json.dumps(asdict(perplexity(model, windows, stride=options.stride)), indent=2))


if __name__ == "__main__":
    main()
