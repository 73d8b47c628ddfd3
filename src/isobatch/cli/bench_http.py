"""The figures of `isobatch bench http`: what a server costs over the engine that is behind it.

The client is a process of its own that does little more than read: a client that parses would take a core of
those that the model is computed on. Both sides use one engine, in turns.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isobatch.cli.bench_cpu import figure, load, prompt_of, seconds
from isobatch.engine.llm import LLM
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import IntegrityError, MissingDependencyError

_BATCH, _PROMPT, _NEW = 64, 32, 32
_GOAL = 0.95
# Reads a number of requests, then for each line of stdin sends them all at once, reads the replies to their
# ends, and says whether each ended well.
_CLIENT = """
import asyncio, sys
host, port, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
requests = [sys.stdin.buffer.read(size) for _ in range(count)]
async def one(request):
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request)
    reply = await reader.read(-1)
    writer.close()
    return b"[DONE]" in reply or b'"usage"' in reply
async def all_of_them():
    return all(await asyncio.gather(*map(one, requests)))
for _line in sys.stdin.buffer:
    print(asyncio.run(all_of_them()), flush=True)
"""


def gate(model: Path) -> list[str]:
    """Checks that replies over HTTP, whole and streamed, are those of `LLM.generate`.

    Returns:
        What is wrong; empty if nothing.

    Raises:
        MissingDependencyError: the extra [server] is not installed.
    """
    llm = load(model, "isobatch")
    failures = []
    (want,) = llm.generate([prompt_of(llm, _PROMPT)], _params())
    with _served(llm) as url:
        for streaming in (True, False):
            reply = _reply(url, _request(llm, streaming=streaming))
            bodies = [line.partition("data: ")[2] for line in reply.splitlines()] if streaming else [reply]
            choices = [c for body in bodies if body.startswith("{") for c in json.loads(body)["choices"]]
            if "".join(choice["text"] for choice in choices) != want.text:
                failures.append(f"streaming {streaming}: another reply over HTTP than from Python")
    return failures


def measure(model: Path, repeats: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measures every figure.

    Args:
        model: as for `bench_cpu.measure`.
        repeats: runs of each side.
        progress: told what is being measured.

    Returns:
        Entries as `bench_cpu.measure` gives them.
    """
    llm = load(model, "isobatch")
    prompts = [prompt_of(llm, _PROMPT)] * _BATCH
    figures = []
    with _served(llm) as url:
        for streaming in (True, False):
            kind = "streaming" if streaming else "whole"
            progress(f"batch {_BATCH} over HTTP, {kind}")
            with _client(url, _request(llm, streaming=streaming)) as ask:
                ours, other = seconds(repeats, ask, lambda: llm.generate(prompts, _params()))
            tokens = _BATCH * _NEW
            what = f"batch {_BATCH}, {_PROMPT} tokens in, {_NEW} out, {kind} over HTTP"
            figures.append(figure(what, "LLM.generate", "tokens/s", tokens / ours, tokens / other, _GOAL))
    return figures


def _params() -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=_NEW, ignore_eos=True)


def _request(llm: LLM, *, streaming: bool) -> bytes:
    body = {
        "model": "bench",
        "prompt": prompt_of(llm, _PROMPT),
        "temperature": 0,
        "max_tokens": _NEW,
        "ignore_eos": True,
        "stream": streaming,
    }
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


@contextmanager
def _served(llm: LLM) -> Iterator[tuple[str, int]]:
    """Serves a model inside the block; gives host and port."""
    try:
        from isobatch.server.models import ServerSettings
        from isobatch.server.run import Server, listen
    except ImportError as error:
        raise MissingDependencyError(f"{error}", fix="pip install isobatch[server]") from error
    taken = listen("127.0.0.1", 0)
    server = Server({"bench": llm}, ServerSettings(), grace_s=1.0)
    host, port = taken.getsockname()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([taken])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield host, port
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def _client(address: tuple[str, int], request: bytes) -> Iterator[Callable[[], None]]:
    """A process that sends a request so many times at once, whenever it is told to."""
    words = [address[0], str(address[1]), str(_BATCH), str(len(request))]
    command = [sys.executable, "-c", _CLIENT, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if process.stdin is None or process.stdout is None:
            raise IntegrityError("a client without pipes")
        process.stdin.write(request * _BATCH)
        asked, answered = process.stdin, process.stdout

        def ask() -> None:
            asked.write(b"\n")
            asked.flush()
            if answered.readline().strip() != b"True":
                raise IntegrityError("a reply over HTTP did not end well")

        yield ask


def _reply(address: tuple[str, int], request: bytes) -> str:
    async def read() -> bytes:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request)
        reply = await reader.read(-1)
        writer.close()
        return reply

    return asyncio.run(read()).partition(b"\r\n\r\n")[2].decode()
