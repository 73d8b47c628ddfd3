"""Clients that go away, that never read, that send too much or too many; engines that fail; keys; the end."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from isobatch import LLM
from isobatch.errors import ConfigError
from isobatch.server import gate, stream
from isobatch.server.logs import JsonLines
from isobatch.server.models import ServerSettings
from isobatch.server.run import listen
from tests.server_harness import QUESTION, Running, serving, slow_down, tiny_folder, tiny_llm, wait_until

CHAT: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "seed": 3, "ignore_eos": True}
PATH = "/v1/chat/completions"
STEP_S = 0.03


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return tiny_llm(tiny_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def slow(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The model, at about 30 tokens per second."""
    slow_down(llm.engine, STEP_S, monkeypatch)
    return llm


@pytest.fixture
def server(slow: LLM) -> Iterator[Running]:
    """One that is idle again after the test."""
    with serving({"tiny": slow}) as running:
        yield running
        running.expect_idle()


def raw_request(body: dict[str, Any], path: str = PATH) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def streamed(client: openai.OpenAI, **changes: Any) -> Iterator[ChatCompletionChunk]:
    """The chunks of CHAT, as the official client reads them."""
    body = {"seed": 3, "ignore_eos": True} | changes
    yield from client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "the quick bits"}], stream=True, extra_body=body
    )


def connected(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.parametrize("streaming", [True, False])
def test_client_that_goes_away_frees_its_blocks_at_once(server: Running, streaming: bool) -> None:
    with connected(server) as client:
        client.sendall(raw_request(CHAT | {"stream": streaming, "n": 3}))
        wait_until(lambda: server.engine.scheduler.num_running == 3)
        if streaming:
            assert b"data: " in client.recv(100_000)
        assert server.engine.pool.num_free < server.engine.pool.num_blocks
    # All of the context would take seven seconds.
    started = time.monotonic()
    server.expect_idle()
    assert time.monotonic() - started < 60 * STEP_S


def test_client_that_goes_away_while_waiting_is_never_run(server: Running) -> None:
    with connected(server) as client:
        client.sendall(raw_request(CHAT | {"max_tokens": 200}))
        wait_until(lambda: server.engine.scheduler.num_running == 1)
        for _ in range(5):
            with connected(server) as other:
                other.sendall(raw_request(CHAT | {"max_tokens": 200}))
            assert server.engine.scheduler.num_running == 1
    server.expect_idle()


def test_others_get_their_own_replies_while_clients_come_and_go(server: Running) -> None:
    body = CHAT | {"max_tokens": 30, "logprobs": True}
    want = server.post(PATH, body).json()["choices"]
    stop = threading.Event()

    def rude() -> None:
        while not stop.is_set():
            with connected(server) as client:
                client.sendall(raw_request(CHAT | {"stream": True, "n": 2}))
                client.recv(100)

    with ThreadPoolExecutor(8) as pool:
        noise = [pool.submit(rude) for _ in range(4)]
        replies = list(pool.map(lambda _: server.post(PATH, body).json()["choices"], range(8)))
        stop.set()
    assert all(one.exception() is None for one in noise)
    assert all(reply == want for reply in replies)


def test_reader_who_does_not_read_is_given_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WRITE_TIMEOUT_S", 0.3)
    with serving({"tiny": llm}) as server, connected(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        # More than the buffers of both sides hold: log-probabilities of 16 prompts.
        body = {"model": "tiny", "prompt": [[7]] * 64, "max_tokens": 200, "n": 4, "logprobs": 20, "seed": 1}
        client.sendall(raw_request(body | {"ignore_eos": True, "stream": True}, "/v1/completions"))
        wait_until(lambda: server.engine.has_work)
        server.expect_idle()


def test_slow_reader_gets_all_of_it(server: Running) -> None:
    body = CHAT | {"max_tokens": 40}
    want = server.post(PATH, body).json()["choices"][0]["message"]["content"]
    with server.client() as client:
        said = ""
        for chunk in streamed(client, max_tokens=40):
            said += chunk.choices[0].delta.content or ""
            time.sleep(0.05)
    assert said == want


def test_deadline_is_told_and_frees_the_blocks(slow: LLM) -> None:
    with serving({"tiny": slow}, ServerSettings(timeout_s=0.3)) as server:
        whole = server.post(PATH, CHAT)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
        with server.client() as client, pytest.raises(openai.APIError) as info:
            list(streamed(client))
        assert info.value.code == "deadline_exceeded"
        assert "[DONE]" not in server.post(PATH, CHAT | {"stream": True}).text
        server.expect_idle()
        assert server.post(PATH, CHAT | {"max_tokens": 2}).status_code == 200


def test_full_queue_is_a_429_that_says_when_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_llm(tiny_folder(tmp_path), max_batch_sequences=2)
    slow_down(llm.engine, STEP_S, monkeypatch)
    with serving({"tiny": llm}, ServerSettings(max_queue=3)) as server:
        body = CHAT | {"max_tokens": 20}
        with ThreadPoolExecutor(9) as pool:
            replies = list(pool.map(lambda _: server.post(PATH, body), range(9)))
        assert sorted(reply.status_code for reply in replies) == [200] * 5 + [429] * 4
        assert all(reply.headers["retry-after"] == "1" for reply in replies if reply.status_code == 429)
        assert (
            len({reply.json()["choices"][0]["message"]["content"] for reply in replies if reply.is_success})
            == 1
        )
        server.expect_idle()
        assert server.post(PATH, body).status_code == 200


def test_event_loop_answers_while_a_step_runs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(llm.engine, 1.0, monkeypatch)
    with serving({"tiny": llm}) as server, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.post, PATH, CHAT | {"max_tokens": 2})
        wait_until(lambda: server.engine.has_work)
        started = time.monotonic()
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert time.monotonic() - started < 0.9
        assert not reply.done()
        assert reply.result().status_code == 200


@pytest.mark.parametrize("streaming", [True, False])
def test_engine_that_fails_hangs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    llm = tiny_llm(tiny_folder(tmp_path))
    whole = llm.engine.step

    def failing(*arguments: Any) -> Any:
        if llm.engine._requests and any(t.text for r in llm.engine._requests.values() for t in r.transcripts):
            raise MemoryError("secret " + __file__)
        return whole(*arguments)

    monkeypatch.setattr(llm.engine, "step", failing)
    with serving({"tiny": llm}) as server:
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda _: server.post(PATH, CHAT | {"stream": streaming}), range(4)))
        for reply in replies:
            assert reply.status_code in ((200, 503) if streaming else (503,))
            assert '"code":' in reply.text
            assert "engine_unavailable" in reply.text
            assert "secret" not in reply.text
            assert "[DONE]" not in reply.text
        assert server.post(PATH, CHAT).json()["error"]["code"] == "engine_unavailable"
        ready = httpx.get(f"{server.url}/ready")
        assert (ready.status_code, ready.json()["models"][0]["state"]) == (503, "failed")
        assert httpx.get(f"{server.url}/health").status_code == 200
    assert any(record.getMessage() == "engine failed" for record in caplog.records)


def test_bug_in_a_route_is_a_500_without_details(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise ZeroDivisionError("secret " + __file__)

    with serving({"tiny": llm}) as server:
        monkeypatch.setattr("isobatch.server.replies.chat_reply", broken)
        reply = server.post(PATH, CHAT | {"max_tokens": 2})
        server.expect_idle()
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert "secret" not in reply.text


# Keys and sizes


def test_keys_open_what_needs_one(llm: LLM) -> None:
    with serving({"tiny": llm}, ServerSettings(keys=("first", "sécond"))) as server:
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}):
            reply = server.post(PATH, CHAT, headers=wrong)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
        for key in ("first", "sécond"):
            given = [(b"Authorization", f"Bearer {key}".encode())]
            reply = httpx.get(f"{server.url}/v1/models", headers=given)
            assert reply.status_code == 200
        for path in ("/", "/static/app.js", "/health", "/ready", "/metrics"):
            assert httpx.get(f"{server.url}{path}").status_code == 200


def test_bodies_that_are_too_large_or_do_not_come_are_refused(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "BODY_TIMEOUT_S", 0.2)
    with serving({"tiny": llm}, ServerSettings(max_body_bytes=2000)) as server:
        large = CHAT | {"user": "x" * 3000}
        assert server.post(PATH, large).json()["error"]["code"] == "request_too_large"
        # Without a length the size shows only as the body comes.
        pieces = iter([raw_request(large).partition(b"\r\n\r\n")[2]])
        headers = {"content-type": "application/json"}
        chunked = httpx.post(f"{server.url}{PATH}", content=pieces, headers=headers)
        assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "request_too_large")
        with connected(server) as client:
            client.sendall(raw_request(CHAT)[:-5])
            assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
        with connected(server) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x: " + b"y" * 100_000 + b"\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 431 ")
        server.expect_idle()


@pytest.mark.parametrize(
    "settings", [{"keys": ("",)}, {"max_queue": -1}, {"timeout_s": 0}, {"timeout_s": float("nan")}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerSettings(**settings)


def test_busy_address_is_refused() -> None:
    taken = listen("127.0.0.1", 0)
    taken.listen()
    with taken, pytest.raises(ConfigError, match="another --port"):
        listen("127.0.0.1", taken.getsockname()[1])


# The end


def test_shutdown_finishes_what_is_in_flight(slow: LLM) -> None:
    body = CHAT | {"max_tokens": 20}
    with ThreadPoolExecutor(2) as pool:
        with serving({"tiny": slow}) as server:
            whole = pool.submit(server.post, PATH, body)
            streamed = pool.submit(server.post, PATH, body | {"stream": True})
            wait_until(lambda: slow.engine.scheduler.num_running == 2)
        assert whole.result().json()["usage"]["completion_tokens"] == 20
        assert streamed.result().text.endswith("data: [DONE]\n\n")
    assert not slow.engine.has_work


def test_shutdown_fails_what_takes_too_long(slow: LLM) -> None:
    with ThreadPoolExecutor(2) as pool:
        with serving({"tiny": slow}, grace_s=0.2) as server:
            whole = pool.submit(server.post, PATH, CHAT)
            streamed = pool.submit(server.post, PATH, CHAT | {"stream": True})
            wait_until(lambda: slow.engine.scheduler.num_running == 2)
        assert whole.result().status_code == 503
        assert "engine_unavailable" in streamed.result().text
    assert slow.engine.pool.num_free == slow.engine.pool.num_blocks


def test_logs_are_json_without_prompts(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "isobatch.server"), serving({"tiny": llm}) as server:
        server.post(PATH, CHAT | {"max_tokens": 2})
        server.post(PATH, CHAT | {"messages": [{"role": "system", "content": "quick secret"}]})
        wait_until(lambda: len(caplog.records) >= 2)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 400]
    assert (requests[0]["path"], requests[0]["reply_tokens"], requests[0]["model"]) == (PATH, 2, "tiny")
    assert "quick" not in json.dumps(lines)


def test_many_tasks_at_once_leave_none(server: Running) -> None:
    async def ask_and_leave() -> None:
        async with server.async_client() as client:
            chats = [client.post("/chat/completions", body=CHAT, cast_to=object) for _ in range(40)]
            tasks = [asyncio.ensure_future(chat) for chat in chats]
            await asyncio.sleep(0.5)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(ask_and_leave())
