"""Loads a server with twice what it can run, for minutes, and counts what comes back.

Clients ask, whole and streamed, leave in the middle, read slowly, send what is no JSON. At the end nothing
may be left of any of them, and every reply must be the one that is given alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from isobatch import LLM, SamplingParams
from isobatch.cli import results
from isobatch.server.models import ServerSettings
from isobatch.server.run import Server, listen

_RUNNING, _QUEUE, _CLIENTS = 8, 4, 16
_TEXTS = ("The sea is", "A compiler is", "Once upon a time", "Bees find flowers", "The capital of Japan")
_LENGTHS = (4, 12, 24)
_TIMEOUT_S = 20.0


class Soak:
    """The clients and what they count.

    Args:
        port: of the server.
        wanted: the reply to each text and length, as given alone.
        until: when to stop, by the monotonic clock.
    """

    def __init__(self, port: int, wanted: dict[tuple[str, int], str], until: float) -> None:
        self._port, self._wanted, self._until = port, wanted, until
        self.counted: Counter[str] = Counter()

    async def client(self, number: int) -> None:
        """Asks and asks."""
        rng = random.Random(number)
        while time.monotonic() < self._until:
            kind = rng.choice(("whole", "streamed", "streamed", "leaves", "slow", "malformed"))
            text, length = rng.choice(_TEXTS), rng.choice(_LENGTHS)
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                self.counted[f"{kind}: {await self._ask(reader, writer, rng, kind, text, length)}"] += 1
            finally:
                writer.close()

    async def _ask(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        rng: random.Random,
        kind: str,
        text: str,
        length: int,
    ) -> str:
        body = {"model": "soak", "prompt": text, "temperature": 0.8, "seed": 1, "max_tokens": length}
        content = json.dumps(body | {"ignore_eos": True, "stream": kind in ("streamed", "slow")}).encode()
        if kind == "malformed":
            content = content[: rng.randrange(len(content))]
        head = "POST /v1/completions HTTP/1.1\r\nhost: soak\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        if kind == "leaves":
            await asyncio.sleep(rng.uniform(0, 2))
            return "left"
        reply = b""
        while piece := await reader.read(200 if kind == "slow" else 1 << 16):
            reply += piece
            if kind == "slow":
                await asyncio.sleep(0.02)
        status = reply[9:12].decode()
        if status != "200":
            return status
        lines = [line.removeprefix("data: ") for line in reply.decode().splitlines()]
        bodies = [json.loads(line) for line in lines if line.startswith("{")]
        for one in bodies:
            if "error" in one:
                return str(one["error"]["code"])
        said = "".join(choice["text"] for one in bodies for choice in one["choices"])
        return "200" if said == self._wanted[text, length] else "200, another reply than alone"


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


async def _run(soak: Soak, minutes: float) -> list[float]:
    """All clients; gives the memory at each tenth of the time."""
    clients = [asyncio.create_task(soak.client(number)) for number in range(_CLIENTS)]
    memory = []
    for _ in range(10):
        await asyncio.sleep(minutes * 6)
        memory.append(round(_resident_mb(), 1))
    await asyncio.gather(*clients)
    return memory


def main() -> int:
    """Runs it; exit code 0 if everything was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak.json"))
    arguments = parser.parse_args()
    llm = LLM("demo", kv_cache_bytes=1 << 27, max_batch_sequences=_RUNNING)
    wanted = {
        (text, length): llm.generate(
            text, SamplingParams(temperature=0.8, seed=1, max_tokens=length, ignore_eos=True)
        )[0].text
        for text in _TEXTS
        for length in _LENGTHS
    }
    taken = listen("127.0.0.1", 0)
    server = Server({"soak": llm}, ServerSettings(max_queue=_QUEUE, timeout_s=_TIMEOUT_S), grace_s=5.0)
    tasks: list[int] = []

    async def serve() -> None:
        serving = asyncio.ensure_future(server.serve([taken]))
        while not server.should_exit:
            await asyncio.sleep(0.2)
            tasks.append(len(asyncio.all_tasks()))
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    while not server.started or not tasks:
        time.sleep(0.1)
    idle_tasks = tasks[-1]
    soak = Soak(taken.getsockname()[1], wanted, time.monotonic() + arguments.minutes * 60)
    memory = asyncio.run(_run(soak, arguments.minutes))
    time.sleep(2)
    pool, worker = llm.engine.pool, server.workers["soak"]
    left = {
        "blocks": pool.num_blocks - pool.num_free,
        "jobs": worker.jobs,
        "requests": int(llm.engine.has_work),
        "tasks": tasks[-1] - idle_tasks,
    }
    server.should_exit = True
    thread.join()
    wrong = sum(n for name, n in soak.counted.items() if "another reply" in name or name[-3:] == "500")
    report: dict[str, Any] = {
        "minutes": arguments.minutes,
        "clients": _CLIENTS,
        "running at once": _RUNNING,
        "waiting at most": _QUEUE,
        "outcomes": dict(sorted(soak.counted.items())),
        "left": left,
        "wrong": wrong,
        "memory_mb": memory,
    }
    results.write(arguments.out, report)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return int(wrong > 0 or any(left.values()))


if __name__ == "__main__":
    sys.exit(main())
