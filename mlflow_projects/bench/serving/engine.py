"""One vLLM engine that is measured on demand, in the environment that serves.

    python engine.py MODEL DTYPE DESCRIPTOR [load]

says on the connection behind that file descriptor that it is ready, and answers requests until the
other side hangs up; with `load` it says what loading took, and ends. The engine runs in this
process, so that the profiler sees its kernels.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from contextlib import suppress
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

PROMPT, PREFILL = 16, 512  # tokens
LARGEST_BATCH = 32
STEPS = 16  # new tokens of a sequence; of a single one
STEPS_ALONE = 64  # since 16 take half a second, in which the machine's own speed changes
# Kernels that multiply by a weight, on the CPU and on GPUs: vLLM's own and PyTorch's.
PRODUCTS = re.compile(
    r"onednn_mm|onednn_scaled_mm|weight_packed_linear|cpu_gemm_wna16|int4_scaled_mm|int8_scaled_mm"
    r"|aten::(linear|addmm|mm|bmm)$|gptq_marlin_gemm|marlin|machete|cutlass_scaled_mm"
)


class Loaded(Exception):  # noqa: N818 - nothing has gone wrong
    """The weights are ready, and nothing else is wanted."""


def read_once(model: Path) -> None:
    """Bring a checkpoint into the system's file cache: what is timed is not the disk."""
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def make(model: str, dtype: str) -> LLM:
    """vLLM with its defaults, but for what the measured phases need."""
    return LLM(
        model,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=PREFILL + 16,
        max_num_seqs=LARGEST_BATCH,
        max_num_batched_tokens=8 * PREFILL,
        enable_prefix_caching=False,  # every repetition computes its prompts
        disable_log_stats=False,  # notes when each request had its first and its last token
    )


def load_seconds(model: str, dtype: str) -> float:
    """What vLLM takes to read the weights, from memory, and to prepare them."""
    read_once(Path(model))
    seconds = []
    load = BaseModelLoader.load_model

    @wraps(load)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        load(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        raise Loaded

    with mock.patch.object(BaseModelLoader, "load_model", timed), suppress(Loaded):
        make(model, dtype)
    return seconds[0]


def decode_steps(batch: int) -> int:
    """New tokens of each of ``batch`` sequences, behind the first."""
    return STEPS if batch > 1 else STEPS_ALONE


class Engine:
    """A model that is ready to be measured."""

    def __init__(self, model: str, dtype: str) -> None:
        self.llm = make(model, dtype)
        self.vocabulary = self.llm.model_config.get_vocab_size()
        self._generator = torch.Generator().manual_seed(0)

    def generate(self, batch: int, prompt: int, new: int) -> dict[str, float]:
        """Seconds for ``batch`` prompts of random tokens and ``new`` tokens each, and how many of
        them pass between all of the first tokens and the last."""
        ids = torch.randint(self.vocabulary, (batch, prompt), generator=self._generator).tolist()
        prompts = [TokensPrompt(prompt_token_ids=one) for one in ids]
        parameters = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - started
        notes = [output.metrics for output in outputs]
        decode = max(note.last_token_ts for note in notes) - max(
            note.first_token_ts for note in notes
        )
        return {"seconds": seconds, "decode": decode}

    def measure(self, phase: str, batch: int) -> dict[str, float]:
        """Tokens a second of one phase, and seconds until all prompts have their first token."""
        if phase == "prefill":
            first = self.generate(batch, PREFILL, 1)["seconds"]
            return {"tokens_per_second": batch * PREFILL / first, "first_token": first}
        steps = decode_steps(batch)
        taken = self.generate(batch, PROMPT, 1 + steps)
        return {
            "tokens_per_second": batch * steps / taken["decode"],
            "first_token": taken["seconds"] - taken["decode"],
        }

    def profile(self, phase: str, batch: int) -> dict[str, float]:
        """Seconds in products with weights, but for those with the vocabulary, and in all."""
        with torch.profiler.profile(record_shapes=True) as profile:
            if phase == "prefill":
                self.generate(batch, PREFILL, 1)
            else:
                self.generate(batch, PROMPT, 1 + decode_steps(batch))
        linear = whole = 0.0
        events = profile.key_averages(group_by_input_shape=True)
        for event in events:
            seconds = (event.self_cpu_time_total + event.self_device_time_total) / 1e6
            whole += seconds
            head = any(self.vocabulary in shape for shape in event.input_shapes if shape)
            if PRODUCTS.search(event.key) and not head:
                linear += seconds
        if not linear:
            raise RuntimeError(
                "the profile shows none of the kernels in PRODUCTS: this release of vLLM "
                "multiplies by another one. Add its name there."
            )
        return {"linear": linear, "whole": whole}


def main(model: str, dtype: str, descriptor: str, only: str = "") -> None:
    """Answer requests: ``(method, arguments)``, until there are no more."""
    with Connection(int(descriptor)) as connection:
        if only == "load":
            connection.send({"vllm": _version(), "load_seconds": load_seconds(model, dtype)})
            return
        engine = Engine(model, dtype)
        connection.send({"vllm": _version()})
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                return
            connection.send(answer(engine, method, arguments))


def answer(engine: Engine, method: str, arguments: tuple[Any, ...]) -> dict[str, float]:
    """What a method of the engine gives, with the most memory that this process has held."""
    found = getattr(engine, method)(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"peak_rss_bytes": peak}


def _version() -> str:
    import vllm

    return vllm.__version__


if __name__ == "__main__":
    main(*sys.argv[1:])
