"""What vLLM's engine answers of several checkpoints, all in one process of the serving environment.

A server is three processes, each of which imports vLLM: that takes five times as long.

    .venvs/serve/bin/python integration_tests/engine_answers.py < jobs.json

reads a JSON object, by name of the checkpoint, of `path`, `tokenizer`, `dtype`, `max_model_len`,
`additional_config`, `prompt` and `steps`. The last line that it prints is another one: of each,
`logprobs` of the prompt's tokens but the first, and `greedy`, the continuation of its first half;
or `error`, a traceback.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Build the engine and ask it."""
    engine = LLM(
        model=job["path"],
        tokenizer=job["tokenizer"],
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        additional_config=job["additional_config"],
        enforce_eager=True,
        distributed_executor_backend="uni",
    )
    prompt = job["prompt"]

    def ask(tokens: list[int], **sampling: Any) -> Any:
        parameters = SamplingParams(temperature=0, **sampling)
        [found] = engine.generate({"prompt_token_ids": tokens}, parameters, use_tqdm=False)
        return found

    scored = ask(prompt, max_tokens=1, prompt_logprobs=0).prompt_logprobs
    half = ask(prompt[: len(prompt) // 2], max_tokens=job["steps"], ignore_eos=True)
    return {
        "logprobs": [
            entry[token].logprob for token, entry in zip(prompt[1:], scored[1:], strict=True)
        ],
        "greedy": list(half.outputs[0].token_ids),
    }


def main() -> None:
    """Answer all."""
    answers: dict[str, Any] = {}
    for name, job in json.load(sys.stdin).items():
        try:
            answers[name] = answer(job)
        except Exception:
            answers[name] = {"error": traceback.format_exc()}
        cleanup_dist_env_and_memory()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
