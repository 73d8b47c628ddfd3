"""The promise over HTTP: one prompt among random others, whole or streamed, and again after a restart.

Replies are taken with the official client. What is compared is all that they say: text, tokens, and each
log-probability as it came over the wire, which holds every bit of a float32.
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from isobatch import LLM
from isobatch.models.locate import demo_weights
from tests.server_harness import Running, serving, tiny_folder, tiny_llm

PROMPT = "Tell me about the sea"
KINDS = [(temperature, streaming) for temperature in (0.0, 0.8) for streaming in (True, False)]
Said = tuple[object, ...]


def request(text: str, temperature: float, seed: int, length: int) -> dict[str, Any]:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": text}],
        "temperature": temperature,
        "seed": seed,
        "max_tokens": length,
        "logprobs": True,
        "top_logprobs": 2,
    }


async def chat(client: openai.AsyncOpenAI, body: dict[str, Any], *, streaming: bool) -> Said:
    """What a reply says, put together if it is streamed."""
    create: Any = client.chat.completions.create
    if not streaming:
        reply = await create(**body)
        choice = reply.choices[0]
        tokens = choice.logprobs.content
        end, text = choice.finish_reason, choice.message.content
    else:
        chunks = [chunk async for chunk in await create(**body, stream=True)]
        reply, choices = chunks[0], [chunk.choices[0] for chunk in chunks]
        tokens = [token for choice in choices for token in choice.logprobs.content]
        end, text = choices[-1].finish_reason, "".join(choice.delta.content or "" for choice in choices)
    scores = [(t.token, t.logprob, *((top.token, top.logprob) for top in t.top_logprobs)) for t in tokens]
    return reply.system_fingerprint, text, end, *scores


async def flood(running: Running, copies: int, others: int, seed: int, length: int) -> dict[float, set[Said]]:
    """Copies of PROMPT of each kind among other prompts, all at once in random order.

    Returns:
        The different answers at each temperature.
    """
    rng = random.Random(seed)
    answers: dict[float, set[Said]] = {0.0: set(), 0.8: set()}

    async def copy(temperature: float, streaming: bool) -> None:
        answers[temperature].add(
            await chat(client, request(PROMPT, temperature, 7, length), streaming=streaming)
        )

    async def other() -> None:
        text = " ".join(rng.choices(PROMPT.split(), k=rng.randint(1, 20)))
        body = request(text, rng.choice([0.0, 1.0]), rng.randrange(1000), rng.randint(1, length))
        await chat(client, body, streaming=rng.random() < 0.5)

    async with running.async_client(timeout=300) as client:
        asked = [copy(*kind) for kind in KINDS for _ in range(copies)] + [other() for _ in range(others)]
        rng.shuffle(asked)
        await asyncio.gather(*asked)
    return answers


@pytest.mark.weights
def test_two_hundred_chats_and_a_restart_give_one_answer_each() -> None:
    answers: dict[float, set[Said]] = {0.0: set(), 0.8: set()}
    for half in range(2):
        llm = LLM(demo_weights(), kv_cache_bytes=2**28, progress=False)
        with serving({"demo": llm}) as running:
            for temperature, said in asyncio.run(flood(running, 13, 48, half, 8)).items():
                answers[temperature] |= said
            running.expect_idle()
    assert [len(said) for said in answers.values()] == [1, 1]
    assert answers[0.0] != answers[0.8]


def test_control_stock_kernels_give_more_than_one(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    distinct = {}
    for kernels in ("isobatch", "stock"):
        with serving({"demo": tiny_llm(folder, kernels=kernels)}) as running:
            answers = asyncio.run(flood(running, 6, 24, 1, 20))
            running.expect_idle()
        distinct[kernels] = [len(said) for said in answers.values()]
        assert {said[0] is None for answer in answers.values() for said in answer} == {kernels == "stock"}
    assert distinct["isobatch"] == [1, 1]
    assert max(distinct["stock"]) > 1


def test_batch_of_a_thousand_prompts_has_the_bits_of_each_alone(tmp_path: Path) -> None:
    texts = [f"the {word} fox" for word in ("quick", "brown", "same", "bits")]
    body = {"model": "demo", "max_tokens": 3, "temperature": 0, "logprobs": 5, "ignore_eos": True}
    with serving({"demo": tiny_llm(tiny_folder(tmp_path), kv_cache_bytes=2**25)}) as running:
        alone = [running.post("/v1/completions", body | {"prompt": text}).json() for text in texts]
        batch = running.post("/v1/completions", body | {"prompt": texts * 250}).json()
        running.expect_idle()
    for choice in batch["choices"]:
        assert choice | {"index": 0} == alone[choice["index"] % len(texts)]["choices"][0]


# A process that is killed


@contextmanager
def served_by_a_process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`isobatch serve` on a port that it chooses; killed at the end, if it still lives."""
    command = [sys.executable, "-m", "isobatch", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--served-model-name", "demo", "--set", f"kv_cache_bytes={2**23}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("isobatch: serving"):
                break
        else:
            raise AssertionError("".join(said))
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


def wait_for(url: str) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as client:
        assert client.get(f"{url}/ready", timeout=30).status_code == 200


def stream_and_signal(
    process: subprocess.Popen[str], url: str, body: dict[str, Any], number: signal.Signals
) -> list[str]:
    """The lines of a stream in whose middle the server gets a signal."""
    lines = []
    streamed = body | {"stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=streamed, timeout=60) as stream:
        for line in stream.iter_lines():
            lines.append(line)
            if len(lines) == 4:
                process.send_signal(number)
    return lines


def test_killed_and_restarted_it_gives_the_same_bits(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    body = request("the quick bits", 0.8, 5, 200) | {"ignore_eos": True}
    replies = []
    for _ in range(2):
        with served_by_a_process(folder) as (process, url):
            wait_for(url)
            replies.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json())
            with pytest.raises(httpx.TransportError):
                stream_and_signal(process, url, body, signal.SIGKILL)
    for reply in replies:
        assert reply.pop("system_fingerprint").startswith("iso-")
        del reply["id"], reply["created"]
    assert replies[0] == replies[1]


def test_told_to_stop_it_finishes_its_streams(tmp_path: Path) -> None:
    body = request("the quick bits", 0.8, 5, 200) | {"ignore_eos": True}
    with served_by_a_process(tiny_folder(tmp_path)) as (process, url):
        wait_for(url)
        lines = stream_and_signal(process, url, body, signal.SIGTERM)
        assert lines[-2:] == ["data: [DONE]", ""]
        assert process.wait(30) == -signal.SIGTERM


def test_answers_are_those_without_drafts(tmp_path: Path) -> None:
    """Though a streamed piece may bring several tokens."""
    folder = tiny_folder(tmp_path)
    answers: dict[float, set[Said]] = {0.0: set(), 0.8: set()}
    for drafts in (0, 5):
        with serving({"demo": tiny_llm(folder, draft_tokens=drafts)}) as running:
            for temperature, said in asyncio.run(flood(running, 4, 12, 1, 60)).items():
                answers[temperature] |= said
            running.expect_idle()
            assert bool(running.engine.accepted_tokens) is bool(drafts)
    assert [len(said) for said in answers.values()] == [1, 1]
