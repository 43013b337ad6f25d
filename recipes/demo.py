"""Compress SmolLM2-135M with three recipes, say what it cost and what it saved, chat with the
results, and serve two of them with vLLM.

    make demo

Calibrates on the reference text that CPython ships (`pydoc_data.topics`) and measures perplexity on
a part of it that was held out, so it needs no data set. vLLM is run in an environment of its own,
the one that `make .venvs/serve` makes; the model whose neurons were removed is served with every
plugin switched off. Writes to `demo_out/` and to MLflow.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.vllm_server import CPU_SETTINGS, ServerError, serve, vllm_program

# Warnings and progress bars are enough here; the whole log of a run is llm-compressor's default.
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
OUT = Path("demo_out")
RECIPES = {"CUR": "cur_then_gptq", "ID": "id_then_gptq", "pruned": "prune_then_gptq"}
SAMPLES, SEQUENCE_LENGTH = 32, 384
WINDOWS, WINDOW = 12, 512
QUESTIONS = ("What does a for loop do in Python?", "What is the capital of France?")
ANSWER_TOKENS = 40
SERVE_ARGUMENTS = (
    "--max-model-len",
    "1024",
    "--enforce-eager",  # one answer is not worth the time that compiling takes on a CPU
)


@dataclass(frozen=True)
class Served:
    """A checkpoint that is served.

    Attributes:
        label: of its row in the table.
        name: what its clients call it.
        environment: variables of the server.
    """

    label: str
    name: str
    environment: dict[str, str]

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of ``vllm serve``, behind the checkpoint."""
        return ("--served-model-name", self.name, *SERVE_ARGUMENTS)


SERVED = (
    Served("ID + GPTQ W4A16", "smollm2-id", {}),
    # Without our plugin and all others. Four bits of stock vLLM take AVX-512 or a GPU.
    Served("pruned", "smollm2-pruned", {"VLLM_PLUGINS": ""}),
)


@dataclass
class Row:
    """One line of the final table."""

    model: str
    megabytes: float
    parameters: int
    perplexity: float
    seconds: float | None = None


def main() -> None:
    """Dense, then each recipe without and with its quantization stage, then two of them served."""
    started = time.perf_counter()
    check_serving()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from cur_modifier.compress import compress, save_dense, weight_bytes
    from cur_modifier.data import read_documents, token_windows
    from cur_modifier.evaluate import perplexity
    from cur_modifier.modifiers.report import parameter_count
    from cur_modifier.precision import computed_dtype
    from tools.smollm2 import smollm2

    logging.set_verbosity_error()
    dtype = computed_dtype(torch.bfloat16)
    source = str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration, held_out = write_reference_text(OUT / "text", tokenizer)
    windows = token_windows(
        read_documents(held_out), tokenizer, windows=WINDOWS, sequence_length=WINDOW
    )
    rows: list[Row] = []
    answers: dict[str, list[str]] = {}

    def measure(label: str, directory: str | Path, seconds: float | None) -> float:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        counted = parameter_count(model) if seconds is None else parameters[label]
        value = perplexity(model, windows).perplexity
        rows.append(Row(label, weight_bytes(directory) / 1e6, counted, value, seconds))
        if seconds is None or "GPTQ" in label:
            answers[label] = [chat(model, tokenizer, question) for question in QUESTIONS]
        return value

    parameters: dict[str, int] = {}
    dense = OUT / "dense"
    shutil.rmtree(dense, ignore_errors=True)
    save_dense(source, dense)
    measure("dense", dense, None)
    for way, label, recipe in labelled_recipes():
        print(f"\n== {label}: {recipe}", flush=True)
        directory = directory_of(label)
        with tracked_run(f"demo {label}") as log_metric:
            seconds = compress(
                recipe,
                source,
                calibration,
                directory,
                samples=SAMPLES,
                sequence_length=SEQUENCE_LENGTH,
            )
            parameters[label] = stored_parameters(directory, parameters, way, label)
            log_metric("perplexity", measure(label, directory, seconds))
            log_metric("checkpoint_bytes", weight_bytes(directory))

    print_table(rows)
    print_answers(answers)
    for served in SERVED:
        serve_and_chat(served, QUESTIONS[0])
    print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes; checkpoints in {OUT}/.")
    print("Every run, with its figures and per-layer table:")
    print(f"    {Path(sys.executable).parent / 'mlflow'} ui    # then open the address it prints")


def labelled_recipes() -> Iterator[tuple[str, str, Path]]:
    """The way, the label and the file of what is compressed: each recipe without its quantization,
    then whole."""
    import yaml

    for way, name in RECIPES.items():
        whole = HERE / f"{name}.yaml"
        stages = yaml.safe_load(whole.read_text())["compress_stage"]
        del stages["quantization_modifiers"]
        unquantized = OUT / f"{name}.unquantized.yaml"
        unquantized.write_text(yaml.safe_dump({"compress_stage": stages}, sort_keys=False))
        yield way, way, unquantized
        yield way, f"{way} + GPTQ W4A16", whole


def check_serving() -> None:
    """Raise where the last step could not run: now, and not after minutes of compression."""
    import openai  # noqa: F401

    vllm_program()


def directory_of(label: str) -> Path:
    """Where the checkpoint of a row of the table is saved."""
    return OUT / label.lower().replace(" + ", "-").replace(" ", "-")


def write_reference_text(folder: Path, tokenizer: Any) -> tuple[Path, Path]:
    """CPython's reference topics as text: every fifth to evaluate on, the others to calibrate on.

    Every other one of the latter is put as an answer in a chat, since the model will be asked to
    chat: what calibration never shows, a compressed model may forget.
    """
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "calibration.txt", folder / "held_out.txt"
    names = sorted(topics)
    calibration = []
    for index, name in enumerate(n for i, n in enumerate(names) if i % 5):
        question = {"role": "user", "content": f"What is {name} in Python?"}
        answer = {"role": "assistant", "content": topics[name]}
        calibration.append(
            tokenizer.apply_chat_template([question, answer], tokenize=False)
            if index % 2
            else topics[name]
        )
    paths[0].write_text("\n\n".join(calibration))
    paths[1].write_text("\n\n".join(topics[name] for name in names[::5]))
    return paths


def stored_parameters(directory: Path, known: dict[str, int], way: str, label: str) -> int:
    """Parameters of a checkpoint; quantization changes their bits, not their number."""
    if label != way:
        return known[way]
    from safetensors import safe_open

    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                if tensors.get_slice(key).get_dtype().startswith(("BF", "F")):
                    size = 1
                    for side in tensors.get_slice(key).get_shape():
                        size *= side
                    total += size
    return total


@contextmanager
def tracked_run(name: str) -> Any:
    """An MLflow run that the CUR stage joins; gives the function that logs a metric to it."""
    try:
        import mlflow
    except ImportError:
        with nullcontext():
            yield lambda key, value: None
        return
    with mlflow.start_run(run_name=name):
        yield mlflow.log_metric


def chat(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy answer to one question."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return tokenizer.decode(
        output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True
    ).strip()


def print_table(rows: list[Row]) -> None:
    """Bytes, parameters, perplexity and seconds, each beside its share of the dense model's."""
    dense = rows[0]
    print(
        f"\n{'model':<18} {'MB on disk':>16} {'parameters':>20} {'perplexity':>11} {'seconds':>8}"
    )
    for row in rows:
        size = f"{row.megabytes:.1f} ({row.megabytes / dense.megabytes:.0%})"
        count = f"{row.parameters / 1e6:.1f} M ({row.parameters / dense.parameters:.0%})"
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        print(f"{row.model:<18} {size:>16} {count:>20} {row.perplexity:>11.2f} {seconds:>8}")
    print(
        f"Perplexity on {WINDOWS} windows of {WINDOW} tokens of held-out Python reference text; "
        f"calibrated\non {SAMPLES} windows of {SEQUENCE_LENGTH}. The embedding (28.3 M parameters) "
        "stays bfloat16."
    )


def print_answers(answers: dict[str, list[str]]) -> None:
    """What every model answers, question by question."""
    for index, question in enumerate(QUESTIONS):
        print(f"\nQ: {question}")
        for label, replies in answers.items():
            print(f"   {label:<18} {' '.join(replies[index].split())}")


def serve_and_chat(served: Served, question: str) -> None:
    """Serve a checkpoint with `vllm serve`, ask it a question as an OpenAI client, and end it."""
    directory = directory_of(served.label)
    log = OUT / f"vllm-{served.name}.log"
    plugins = "without any plugin" if served.environment else "with our plugin"
    print(f"\n== Serving {directory} with vLLM, {plugins}. To do the same:\n")
    print_serve_commands(served, question)
    print(f"\nStarting the server; its log is {log}", flush=True)
    started = time.perf_counter()
    with serve(directory, *served.arguments, log=log, environment=served.environment) as server:
        print(f"Up after {time.perf_counter() - started:.0f} s at {server.url}")
        print(f"\nQ: {question}\n   {'vLLM':<18} ", end="", flush=True)
        stream_answer(f"{server.url}/v1", served, question)
        stopping = time.perf_counter()
    how = "ended by itself" if server.ended_by_itself else "did not end and was killed"
    print(
        f"\nSent SIGTERM: the server {how} after {time.perf_counter() - stopping:.1f} s "
        f"(exit status {server.process.returncode})"
    )


def chat_request(served: Served, question: str) -> dict[str, Any]:
    """A request for the greedy answer to one question, as the API of OpenAI has it."""
    return {
        "model": served.name,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
    }


def stream_answer(base_url: str, served: Served, question: str) -> None:
    """Print a server's answer as it arrives, on one line like the answers before it."""
    import openai

    # Retries would hide what the server's log shows.
    client = openai.OpenAI(base_url=base_url, api_key="not needed", max_retries=0)
    request = chat_request(served, question)
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            print((choice.delta.content or "").replace("\n", " "), end="", flush=True)
    print()


def print_serve_commands(served: Served, question: str) -> None:
    """What to type to serve the checkpoint on vLLM's usual port, and to ask it the question."""
    import torch

    variables = (
        served.environment if torch.cuda.is_available() else CPU_SETTINGS | served.environment
    )
    if variables:
        print("   ", *(f"{name}={value}" for name, value in variables.items()), "\\")
    program = os.path.relpath(vllm_program())
    print("   ", shlex.join([program, "serve", str(directory_of(served.label))]), "\\")
    print("   ", shlex.join(served.arguments))
    print()
    print("    curl http://127.0.0.1:8000/v1/chat/completions \\")
    print("    -H 'Content-Type: application/json' \\")
    print("    -d", shlex.quote(json.dumps(chat_request(served, question))))


if __name__ == "__main__":
    try:
        main()
    except ServerError as error:  # its message says what to do, or shows the server's log
        sys.exit(f"error: {error}")
