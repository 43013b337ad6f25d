"""What a checkpoint answers: through transformers, a real ``vllm serve``, vLLM's engine alone."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support import CORES
from transformers import AutoModelForCausalLM

from cur_modifier.precision import has_bfloat16_units
from tools import vllm_server

MAX_LENGTH = 512
# For what asks for many tokens and no particular dtype: a CPU without units for bfloat16 emulates
# it at a sixth of float32's speed.
FAST_DTYPE = "bfloat16" if has_bfloat16_units(torch.device("cpu")) else "float32"
# A test asks one thing at a time, and other tests run beside it: one thread, wherever it is free.
ONE_THREAD = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


# The tests' models are small: by default they would be served dense.
KEEP_FACTORS = {"cur_keep_factors": True}


class EngineError(Exception):
    """The engine was not built, or did not answer; its traceback."""


@dataclass(frozen=True)
class Answers:
    """Log-probabilities ``(n − 1,)`` of a prompt's tokens but the first, and a greedy continuation
    of its first half."""

    logprobs: torch.Tensor
    greedy: list[int]

    def distance(self, other: Answers) -> float:
        """The largest difference in log-probability."""
        return (self.logprobs - other.logprobs).abs().max().item()

    def deviation(self, other: Answers) -> float:
        """The root mean square difference in log-probability."""
        return (self.logprobs - other.logprobs).square().mean().sqrt().item()


def by_transformers(
    path: Path, prompt: list[int], steps: int, dtype: torch.dtype = torch.float32
) -> Answers:
    """What ``from_pretrained`` answers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
        half = ids[:, : len(prompt) // 2]
        model.generation_config.eos_token_id = None  # go on past it, as the server is asked to
        output = model.generate(
            half, attention_mask=torch.ones_like(half), max_new_tokens=steps, do_sample=False
        )
    return Answers(chosen, output[0, half.shape[1] :].tolist())


def by_server(server: Any, prompt: list[int], steps: int) -> Answers:
    """What a running server answers."""
    [model] = [entry["id"] for entry in server.json("/v1/models")["data"]]
    request = {"model": model, "temperature": 0, "return_token_ids": True}
    scored = server.post(
        "/v1/completions", {**request, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}
    )["choices"][0]["prompt_logprobs"]
    logprobs = [
        entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], scored[1:], strict=True)
    ]
    half = prompt[: len(prompt) // 2]
    continued = server.post(
        "/v1/completions",
        {**request, "prompt": half, "max_tokens": steps, "ignore_eos": True},
    )
    return Answers(torch.tensor(logprobs), continued["choices"][0]["token_ids"])


# Stock vLLM: no plugin is loaded, ours neither.
WITHOUT_PLUGINS = {"VLLM_PLUGINS": ""}


def serve_quietly(
    path: Path,
    log: Path,
    *arguments: str,
    dtype: str = "float32",
    environment: Mapping[str, str] | None = None,
) -> Any:
    """The context of a ``vllm serve path`` that keeps factors and leaves room for others."""
    return vllm_server.serve(
        path,
        *("--dtype", dtype, "--max-model-len", str(MAX_LENGTH)),
        *("--additional-config", json.dumps(KEEP_FACTORS)),
        *arguments,
        log=log,
        environment=ONE_THREAD | dict(environment or {}),
        timeout=800,
    )


def served(
    path: Path,
    log: Path,
    prompt: list[int],
    steps: int,
    *arguments: str,
    dtype: str = "float32",
    environment: Mapping[str, str] | None = None,
) -> Answers:
    """What ``vllm serve path`` answers."""
    settings: dict[str, Any] = {"dtype": dtype, "environment": environment}
    with serve_quietly(path, log, *arguments, **settings) as server:
        return by_server(server, prompt, steps)


def by_engine(
    paths: Mapping[str, Path],
    tokenizer: Path,
    prompt: list[int],
    steps: int,
    dtype: str = "float32",
) -> dict[str, Answers | EngineError]:
    """What vLLM's engine answers of each checkpoint, all in one process."""
    jobs = {
        name: {
            "path": str(path),
            "tokenizer": str(tokenizer),
            "dtype": dtype,
            "max_model_len": MAX_LENGTH,
            "additional_config": KEEP_FACTORS,
            "prompt": prompt,
            "steps": steps,
        }
        for name, path in paths.items()
    }
    return {
        name: EngineError(found["error"])
        if "error" in found
        else Answers(torch.tensor(found["logprobs"]), found["greedy"])
        for name, found in by_script("engine_answers.py", jobs).items()
    }


def by_script(name: str, given: Any = None, *, timeout: float | None = None) -> Any:
    """What a script of this folder prints last, run in the serving environment with ``given`` as
    its input; both are JSON."""
    python = vllm_server.vllm_program().with_name("python")
    done = subprocess.run(
        [str(python), str(Path(__file__).with_name(name))],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**vllm_server.CPU_SETTINGS, **os.environ, **ONE_THREAD},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def side_by_side(jobs: dict[str, Any]) -> dict[str, Any]:
    """Results of the jobs by name, as many at a time as this process has cores; errors as results.

    Most of a server's start is one process that imports, so two start in little more than the time
    of one.
    """
    with ThreadPoolExecutor(CORES) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
    return {name: future.exception() or future.result() for name, future in futures.items()}


def result(results: Mapping[str, Any], name: str) -> Any:
    """One of :func:`side_by_side`'s results.

    Raises:
        BaseException: what the job raised.
    """
    if isinstance(results[name], BaseException):
        raise results[name]
    return results[name]
