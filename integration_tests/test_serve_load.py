"""A real ``vllm serve`` under load: 300 requests at once, some given up, some malformed."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from openai import APIStatusError, AsyncOpenAI
from scipy import stats
from served import FAST_DTYPE, ONE_THREAD, vllm_server
from support import CUR, ROUND_TO_NEAREST, recipe_text
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.thorough]

MODEL = "smollm2"
MAX_LENGTH = 1024
LONGEST_PROMPT, LONGEST_ANSWER = 400, 48
EQUAL_PROMPTS, COPIES, EQUAL_ANSWER = 20, 4, 32
CANCELLED = 40
# An answer that is given up is long: where the server went on, it would show in the tokens counted.
CANCELLED_ANSWER = 600
REQUESTS = 300
ROUNDS = 3  # the first one warms up; memory is compared after the second and the third
PATIENCE = 240.0  # seconds for any one answer; the slowest of a round took 55 with 20 on 2 cores
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = {"model": MODEL, "prompt": "Hello", "max_tokens": 4}
SAY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
LONG = "word " * 2 * MAX_LENGTH

# What a client can get wrong, by the path it is sent to. Bytes are sent as they are.
MALFORMED: list[tuple[str, dict[str, Any] | bytes]] = [
    (COMPLETIONS, {**ASK, "model": "unknown"}),
    (CHAT, {**SAY, "model": "unknown"}),
    (CHAT, {**SAY, "model": 5}),
    (COMPLETIONS, {**ASK, "max_tokens": -1}),
    (CHAT, {**SAY, "max_tokens": -7}),
    (COMPLETIONS, {**ASK, "max_tokens": "many"}),
    (CHAT, {**SAY, "max_tokens": [4]}),
    (COMPLETIONS, {**ASK, "max_tokens": 10**30}),
    (CHAT, {**SAY, "max_tokens": MAX_LENGTH + 1}),
    (COMPLETIONS, {**ASK, "prompt": LONG}),
    (COMPLETIONS, {**ASK, "prompt": LONG, "stream": True}),
    (COMPLETIONS, {**ASK, "prompt": [5] * (MAX_LENGTH + 1)}),
    (CHAT, {**SAY, "messages": [{"role": "user", "content": LONG}]}),
    (COMPLETIONS, {**ASK, "prompt": [10**6]}),  # no such token
    (COMPLETIONS, {**ASK, "prompt": {"text": "Hello"}}),
    (COMPLETIONS, {**ASK, "prompt": ""}),
    (COMPLETIONS, {"model": MODEL}),
    (CHAT, {"model": MODEL}),
    (CHAT, {**SAY, "messages": []}),
    (CHAT, {**SAY, "messages": "Hello"}),
    (CHAT, {**SAY, "messages": [{"content": "Hello"}]}),
    (COMPLETIONS, {**ASK, "temperature": -1}),
    (CHAT, {**SAY, "temperature": 99, "stream": True}),
    (CHAT, {**SAY, "temperature": "hot"}),
    (COMPLETIONS, {**ASK, "top_p": 2}),
    (COMPLETIONS, {**ASK, "logprobs": 1000}),
    (COMPLETIONS, {**ASK, "n": 0}),
    (COMPLETIONS, b'{"model": "smollm2", "prompt": '),
    (COMPLETIONS, b"\xff\xfe"),
    (CHAT, b""),
]


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        path: COMPLETIONS or CHAT.
        body: what is sent, without what ``kind`` and ``stream`` add.
        kind: "plain"; "equal", one of several copies; "cancelled" half-way; "malformed".
        group: which of the equal prompts it is a copy of.
    """

    path: str
    body: dict[str, Any] | bytes
    kind: str = "plain"
    stream: bool = False
    group: int | None = None


@dataclass
class Outcome:
    """What became of a request: ``error`` says why there is no answer."""

    request: Request
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: int | None = None
    error: str | None = None


@dataclass
class Load:
    """What was seen of one server.

    Attributes:
        rounds: outcomes of each round of the load.
        settled: for each round, whether the server ran nothing any more when all had answered.
        generated: tokens that the server generated in each round, by its own count.
        memory: bytes, after each round.
        after: the answer to a request after all rounds, and the status of /health.
    """

    log: Path
    rounds: list[list[Outcome]] = field(default_factory=list)
    settled: list[bool] = field(default_factory=list)
    generated: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    after: dict[str, Any] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> list[Outcome]:
        """Outcomes of all rounds."""
        return [o for outcomes in self.rounds for o in outcomes if o.request.kind in kinds]


@pytest.fixture(scope="module")
def factored(
    smollm2: Path, smollm2_data: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """SmolLM2 with two layers factored by CUR, and their factors in 4 bits."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    oneshot(model=model, dataset=smollm2_data, recipe=recipe_text(CUR, ROUND_TO_NEAREST))
    path = tmp_path_factory.mktemp("load") / "factored"
    model.save_pretrained(path, save_compressed=True)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def requests(smollm2: Path, reference_text: Path) -> list[Request]:
    """The 300 requests, the same for both servers and in every round."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = tokenizer(reference_text.read_text()[:400_000])["input_ids"]
    draw = random.Random(0)

    def request(chat: bool, max_tokens: int, **kwargs: Any) -> partial[Request]:
        # As many of 1 to 20 tokens as of 20 to 400: both ends are seen, and the time is bearable.
        length = round(LONGEST_PROMPT ** draw.random())
        start = draw.randrange(len(tokens) - length)
        prompt = tokens[start : start + length]
        body = {"model": MODEL, "max_tokens": max_tokens, **kwargs}
        if chat:
            message = {"role": "user", "content": tokenizer.decode(prompt)}
            return partial(Request, CHAT, {**body, "messages": [message]})
        return partial(Request, COMPLETIONS, {**body, "prompt": prompt})

    all_requests = [Request(path, body, "malformed") for path, body in MALFORMED]
    for group in range(EQUAL_PROMPTS):
        make = request(group % 2 == 1, EQUAL_ANSWER, temperature=0)
        all_requests += [make("equal", i % 2 == 1, group) for i in range(COPIES)]
    for i in range(CANCELLED):
        make = request(i // 2 % 2 == 1, CANCELLED_ANSWER)
        all_requests.append(make("cancelled", i % 2 == 1))
    for i in range(REQUESTS - len(all_requests)):
        temperature = draw.choice([0, 0.7, 1.0])
        make = request(i // 2 % 2 == 1, draw.randint(1, LONGEST_ANSWER), temperature=temperature)
        all_requests.append(make("plain", i % 2 == 1))
    draw.shuffle(all_requests)
    return all_requests


@pytest.fixture(scope="module")
def dense_load(
    smollm2: Path, requests: list[Request], tmp_path_factory: pytest.TempPathFactory
) -> Load:
    """One round on the dense model."""
    return loaded(smollm2, requests, 1, tmp_path_factory.mktemp("dense-load") / "vllm.log")


@pytest.fixture(scope="module")
def factored_load(
    factored: Path, requests: list[Request], tmp_path_factory: pytest.TempPathFactory
) -> Load:
    """All rounds on the factored model."""
    return loaded(factored, requests, ROUNDS, tmp_path_factory.mktemp("load") / "vllm.log")


def loaded(model: Path, requests: list[Request], rounds: int, log: Path) -> Load:
    """Serve ``model`` and send it ``requests``, ``rounds`` times."""
    load = Load(log)
    arguments = ["--served-model-name", MODEL, "--max-model-len", str(MAX_LENGTH)]
    arguments += ["--enforce-eager", "--dtype", FAST_DTYPE]
    with vllm_server.serve(model, *arguments, log=log, environment=ONE_THREAD) as server:
        for _ in range(rounds):
            started = time.monotonic()
            before = metric(server, "generation_tokens_total")
            load.rounds.append(asyncio.run(send_all(server.url, requests)))
            load.settled.append(settles(server))
            load.generated.append(metric(server, "generation_tokens_total") - before)
            load.memory.append(memory(server.process.pid))
            print(
                f"{time.monotonic() - started:.0f} s, {load.generated[-1]:.0f} tokens generated, "
                f"{sum(o.completion_tokens for o in load.rounds[-1])} of them answered, "
                f"{load.memory[-1] / 2**20:.0f} MiB, agreement {np.mean(agreement(load)):.3f}"
            )
        load.after["health"] = httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code
        load.after["answer"] = server.post(COMPLETIONS, ASK)
    return load


async def send_all(url: str, requests: list[Request]) -> list[Outcome]:
    """All requests at once."""
    no_limit = httpx.Limits(max_connections=None)
    under_way = asyncio.Event()
    async with (
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as api,
        httpx.AsyncClient(base_url=url, limits=no_limit, timeout=PATIENCE) as raw,
    ):

        async def send(request: Request) -> Outcome:
            outcome = Outcome(request)
            try:
                async with asyncio.timeout(PATIENCE):
                    if request.kind == "malformed":
                        await send_malformed(raw, outcome)
                    elif request.kind == "cancelled":
                        await send_and_cancel(api, outcome, under_way)
                    else:
                        await send_and_read(api, outcome)
                        under_way.set()
            except APIStatusError as error:
                outcome.status, outcome.error = error.status_code, str(error)
            except Exception as error:
                outcome.error = f"{error!r}, because of {error.__cause__!r}"
            return outcome

        return await asyncio.gather(*(send(request) for request in requests))


def create(api: AsyncOpenAI, request: Request) -> Any:
    """The API's call for ``request``, without the stream's arguments."""
    resource = api.chat.completions if request.path == CHAT else api.completions
    return partial(resource.create, **request.body)


async def send_and_read(api: AsyncOpenAI, outcome: Outcome) -> None:
    """Read a whole answer."""
    request = outcome.request
    if request.stream:
        options = {"include_usage": True}
        chunks = await create(api, request)(stream=True, stream_options=options)
        async for chunk in chunks:
            add(outcome, chunk)
    else:
        add(outcome, await create(api, request)())


def add(outcome: Outcome, answer: Any) -> None:
    """Add an answer, or a chunk of one, to ``outcome``."""
    for choice in answer.choices:  # a stream's last chunk has none
        if outcome.request.path == COMPLETIONS:
            outcome.text += choice.text
        else:
            message = choice.delta if outcome.request.stream else choice.message
            outcome.text += message.content or ""
        outcome.finish_reason = choice.finish_reason or outcome.finish_reason
    if answer.usage:
        outcome.prompt_tokens = answer.usage.prompt_tokens
        outcome.completion_tokens = answer.usage.completion_tokens


async def send_and_cancel(api: AsyncOpenAI, outcome: Outcome, under_way: asyncio.Event) -> None:
    """Give up: a stream after its second chunk, others when the first other answer is there.

    By then the server has this request too, generates it or keeps it waiting, and is far from its
    end.
    """
    call = partial(create(api, outcome.request), extra_body={"ignore_eos": True})
    if outcome.request.stream:
        async with await call(stream=True) as chunks:
            await anext(chunks)
            await anext(chunks)
        return
    task = asyncio.ensure_future(call())
    waiting = asyncio.ensure_future(under_way.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()  # an error, and no answer: it is 600 tokens long
        raise AssertionError("was answered before it could be cancelled")
    task.cancel()
    await asyncio.wait([task])


async def send_malformed(raw: httpx.AsyncClient, outcome: Outcome) -> None:
    """Send without the help of a client that knows what is right."""
    body = outcome.request.body
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = await raw.post(outcome.request.path, content=content, headers=headers)
    outcome.status, outcome.text = answer.status_code, answer.text


def metric(server: Any, name: str) -> float:
    """A sum over the lines of one of vLLM's metrics."""
    lines = re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", server.get("/metrics"), re.MULTILINE)
    assert lines, f"vLLM has no metric {name}"
    return sum(map(float, lines))


def settles(server: Any, patience: float = 60) -> bool:
    """Whether the server comes to run nothing, and have nothing waiting."""
    deadline = time.monotonic() + patience
    while metric(server, "num_requests_running") or metric(server, "num_requests_waiting"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def memory(pid: int) -> int:
    """Bytes that a process and its children have for themselves.

    Pages of files are left out: they are the libraries', and how many are in memory, and with whom
    they are shared, depends on what else the machine runs.
    """
    process = psutil.Process(pid)
    kilobytes = 0
    for member in [process, *process.children(recursive=True)]:
        rollup = Path(f"/proc/{member.pid}/smaps_rollup").read_text()
        kilobytes += sum(map(int, re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", rollup, re.M)))
    return kilobytes * 1024


def agreement(load: Load) -> list[float]:
    """For each of the equal prompts the share of copies with its most frequent answer, round 1."""
    answers: dict[int, Counter[str]] = {}
    for outcome in load.rounds[0]:
        if outcome.request.group is not None:
            answers.setdefault(outcome.request.group, Counter())[outcome.text] += 1
    return [max(counter.values()) / counter.total() for counter in answers.values()]


def test_the_load_is_mixed(requests: list[Request]) -> None:
    assert len(requests) == REQUESTS
    kinds = Counter((r.kind, r.path, r.stream) for r in requests if r.kind != "malformed")
    assert len(kinds) == 12 and min(kinds.values()) >= CANCELLED // 4
    well_formed = [r.body for r in requests if r.kind != "malformed"]
    lengths = [len(body["prompt"]) for body in well_formed if "prompt" in body]
    assert min(lengths) == 1 and max(lengths) > 300


def test_every_well_formed_request_is_answered(dense_load: Load, factored_load: Load) -> None:
    for load in (dense_load, factored_load):
        for outcome in load.of_kind("plain", "equal"):
            body = outcome.request.body
            assert outcome.error is None, (outcome, load.log)
            assert outcome.finish_reason in ("stop", "length"), outcome
            if outcome.finish_reason == "length":
                assert outcome.completion_tokens == body["max_tokens"], outcome
            assert 1 <= outcome.completion_tokens <= body["max_tokens"], outcome
            if outcome.request.path == COMPLETIONS:
                assert outcome.prompt_tokens == len(body["prompt"]), outcome
            assert outcome.prompt_tokens >= 1, outcome


def test_every_malformed_request_is_refused(factored_load: Load) -> None:
    for outcome in factored_load.of_kind("malformed"):
        assert outcome.error is None, (outcome, factored_load.log)
        assert outcome.status is not None and 400 <= outcome.status < 500, outcome
        body = outcome.request.body
        if isinstance(body, dict) and body["model"] == "unknown":
            assert outcome.status == 404, outcome
        assert json.loads(outcome.text), outcome  # says why


def test_cancelled_requests_are_aborted(factored_load: Load) -> None:
    """The server notices that a client left: it does not generate the rest for nobody."""
    for outcome in factored_load.of_kind("cancelled"):
        assert outcome.error is None, (outcome, factored_load.log)
    assert all(factored_load.settled), factored_load.log
    for outcomes, generated in zip(factored_load.rounds, factored_load.generated, strict=True):
        answered = sum(o.completion_tokens for o in outcomes)
        # Measured: 30 to 53 of the 24 000 that the cancelled ones asked for.
        assert generated - answered < CANCELLED * CANCELLED_ANSWER / 2


def test_equal_prompts_answer_equally_often(dense_load: Load, factored_load: Load) -> None:
    """Batching changes the rounding of bfloat16, so copies may part at a near-tie: on both alike.

    Copies of one prompt share its near-ties and are not independent; prompts are. So what is
    compared is the shares of 20 prompts on one server and on the other, by a permutation test that
    asks whether the factored server's are lower than chance explains. It fails one run in a
    hundred where both are equally unsteady, and never where both always agree, as both do here.
    """
    shares = agreement(dense_load), agreement(factored_load)
    assert len(shares[0]) == len(shares[1]) == EQUAL_PROMPTS
    test = stats.permutation_test(
        (shares[1], shares[0]),
        lambda a, b, axis: np.mean(a, axis) - np.mean(b, axis),
        alternative="less",
        rng=0,
    )
    assert test.pvalue > 0.01, (shares, factored_load.log)


def test_the_server_is_alive_afterwards(factored_load: Load) -> None:
    assert factored_load.after["health"] == 200
    (choice,) = factored_load.after["answer"]["choices"]
    assert choice["finish_reason"] in ("stop", "length")
    assert factored_load.after["answer"]["usage"]["completion_tokens"] >= 1


def test_memory_is_level(factored_load: Load) -> None:
    """The third round leaves no more than the second, up to what the worker's heap moves by.

    Measured on some 3300 MiB: rounds 2 and 3 added 119 and 102 MiB on this model; 2 to 6 added 140,
    132, 92, 100 and 44 on the dense one, all in the worker's heap. So vLLM has yet to find its
    level there, with or without the plugin. A server that kept the activations of its requests,
    some 80 tokens in 210 Linears each, would grow by gigabytes.
    """
    before, after = factored_load.memory[-2:]
    assert after < 1.1 * before, (factored_load.memory, factored_load.log)
