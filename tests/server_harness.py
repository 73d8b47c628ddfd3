"""A server in a thread of the test's process, a tiny model for it, and what must be true once it is idle."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from isobatch import LLM
from isobatch.engine.engine import Engine
from isobatch.server.models import ServerSettings
from isobatch.server.run import Server, listen
from tests.checkpoints import tiny_model, trained_bpe

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["Ünïcödé: the same bits", "the quick brown fox " * 9]
QUESTION = [{"role": "user", "content": "the quick bits"}]
PATIENCE_S = 60.0


def tiny_folder(path: Path) -> Path:
    """A tiny Llama with a tokenizer and a chat template, which speaks in random bytes."""
    tiny_model("llama", vocab_size=448, max_position_embeddings=256).save_pretrained(path)
    trained_bpe("llama-bpe", CORPUS).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


def tiny_llm(folder: Path, **settings: Any) -> LLM:
    return LLM(folder, **{"kv_cache_bytes": 2**23, "progress": False, **settings})


@dataclass
class Running:
    """A server that answers.

    Args:
        server: it.
        url: where.
        loop: its event loop.
        tasks: how many tasks an idle loop has.
    """

    server: Server
    url: str
    loop: asyncio.AbstractEventLoop
    tasks: int = field(init=False)

    def __post_init__(self) -> None:
        self.tasks = self.count_tasks()

    @property
    def engine(self) -> Engine:
        """The first model's."""
        return next(iter(self.server.workers.values())).engine

    def count_tasks(self) -> int:
        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(PATIENCE_S)

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **settings)

    def async_client(self, **settings: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **settings)

    def post(self, path: str, body: object, **settings: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE_S, **settings)

    def expect_idle(self) -> None:
        """Waits until nobody is served, and finds nothing left of those who were.

        Raises:
            AssertionError: a request, a block or a task has leaked.
        """
        wait_until(lambda: all(worker.jobs == 0 for worker in self.server.workers.values()))
        for worker in self.server.workers.values():
            engine = worker.engine
            wait_until(lambda engine=engine: not engine.has_work)  # type: ignore[misc]
            wait_until(lambda engine=engine: engine.pool.num_free == engine.pool.num_blocks)  # type: ignore[misc]
            engine.scheduler.check()
        wait_until(lambda: self.count_tasks() <= self.tasks)


def wait_until(true: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Polls.

    Raises:
        AssertionError: it did not come true.
    """
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


@contextmanager
def serving(
    models: Mapping[str, LLM], settings: ServerSettings | None = None, grace_s: float = 5.0
) -> Iterator[Running]:
    """Serves models on a free port inside the block."""
    taken = listen("127.0.0.1", 0)
    server = Server(models, settings or ServerSettings(), grace_s)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve([taken])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Running(server, f"http://127.0.0.1:{taken.getsockname()[1]}", loops[0])
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def slow_down(engine: Engine, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has each step take longer, so that there is time for something to happen between two tokens."""
    step = engine.step

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return step(*arguments)

    monkeypatch.setattr(engine, "step", slow)
