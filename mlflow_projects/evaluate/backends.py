"""What an evaluation asks: a model in this process, or a server that runs vLLM."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cur_modifier.evaluate import Perplexity, perplexity, perplexity_of
from tools.vllm_server import Client, ServerError, serve

CONCURRENT = 8  # requests that a server has at a time


class BackendError(RuntimeError):
    """The backend can't be used; the message says why and what to do."""


@dataclass
class InProcess:
    """A model loaded with transformers."""

    model: Any
    tokenizer: Any
    batch_size: int

    def perplexity(self, windows: torch.Tensor, stride: int | None) -> Perplexity:
        return perplexity(self.model, windows, stride=stride)

    def lm(self) -> Any:
        """As lm-eval asks it."""
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=self.batch_size)


@dataclass
class Served:
    """A server that runs, at ``url`` without a path."""

    server: Client
    name: str
    max_length: int
    source: str

    def perplexity(self, windows: torch.Tensor, stride: int | None) -> Perplexity:
        if windows.shape[1] >= self.max_length:
            raise BackendError(
                f"windows of {windows.shape[1]} tokens and one to answer with do not fit into the "
                f"server's max_model_len {self.max_length}. Give a shorter sequence_length, or "
                "start the server with a longer one."
            )
        return perplexity_of(self._score, windows, stride=stride)

    def lm(self) -> Any:
        """As lm-eval asks it."""
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        return LocalCompletionsAPI(
            model=self.name,
            base_url=f"{self.server.url}/v1/completions",
            tokenizer=self.source,
            num_concurrent=CONCURRENT,
            max_length=self.max_length,
        )

    def _score(self, window: torch.Tensor) -> torch.Tensor:
        """From the log-probabilities of a prompt that the server echoes."""
        ids = window.tolist()
        body = {
            "model": self.name,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }
        try:
            answer = self.server.post("/v1/completions", body)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise BackendError(f"{self.server.url} answers {error.code}: {said}") from None
        except OSError as error:
            raise BackendError(f"{self.server.url} does not answer any more: {error}") from None
        values = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)]
        return torch.tensor(values, dtype=torch.float64)


@contextmanager
def transformers_backend(
    source: str, dtype: str, batch_size: int, auto_class: str
) -> Iterator[InProcess]:
    """The model in this process, float32 unless ``dtype`` says otherwise.

    Args:
        auto_class: of transformers, which loads it with the head that is asked.
    """
    import transformers

    import cur_modifier  # noqa: F401 - registers the format

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = getattr(transformers, auto_class).from_pretrained(
        source, dtype=getattr(torch, dtype or "float32")
    )
    if torch.cuda.is_available():
        model.to("cuda")
    yield InProcess(model, tokenizer, batch_size)


@contextmanager
def vllm_backend(source: str, dtype: str, max_length: int, log: Path) -> Iterator[Served]:
    """A ``vllm serve`` of its own, in the checkpoint's dtype unless ``dtype`` says otherwise."""
    # Compiling takes longer than an evaluation gains by it on a CPU, and changes no result.
    arguments = ["--max-model-len", str(max_length), "--dtype", dtype or "auto"]
    if not torch.cuda.is_available():
        arguments.append("--enforce-eager")
    try:
        with serve(source, *arguments, log=log) as server:
            yield Served(server, source, max_length, source)
    except ServerError as error:
        raise BackendError(str(error)) from None


@contextmanager
def url_backend(url: str, source: str) -> Iterator[Served]:
    """A server that someone else has started; it is left running.

    Raises:
        BackendError: it does not answer, or serves another model.
    """
    client = Client(url)
    try:
        models = client.json("/v1/models", timeout=10)["data"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise BackendError(
            f"no server of the OpenAI API answers at {url} ({error}). Start one with "
            f"`vllm serve {source}`, or give backend=vllm, which starts its own."
        ) from None
    served = [m for m in models if _names(m["id"], source) or _names(m.get("root"), source)]
    if not served:
        raise BackendError(
            f"{url} serves {[m['id'] for m in models]}, not {source}: its figures would be "
            f"another model's. Serve it by that name: `vllm serve {source}`."
        )
    if "max_model_len" not in served[0]:
        raise BackendError(
            f"{url} does not say how long its prompts may be, which servers of vLLM do. Give "
            "backend=vllm."
        )
    yield Served(client, served[0]["id"], served[0]["max_model_len"], source)


def _names(name: str | None, source: str) -> bool:
    """Whether a server that was started with ``name`` serves ``source``: a hub name, or a whole
    path, of which the server may have been given the end, as of its own folder."""
    if not name:
        return False
    end = Path(name).parts
    whole = Path(source)
    return name == source or (whole.is_absolute() and whole.parts[-len(end) :] == end)
