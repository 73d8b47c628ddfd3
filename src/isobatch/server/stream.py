"""Server-sent events as OpenAI sends them, and what happens when nobody listens any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from isobatch.errors import IsobatchError
from isobatch.server.errors import api_error
from isobatch.server.job import Job

_DONE = b"data: [DONE]\n\n"
WRITE_TIMEOUT_S = 60.0
"""How long a client may keep the server from writing before its request is given up."""


def event(body: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Jobs:
    """What a response is made from, closed as a whole when it is over or nobody is there to read it.

    Args:
        jobs: the first of them.
    """

    def __init__(self, *jobs: Job) -> None:
        self._jobs = list(jobs)
        self._last: list[Callable[[], None]] = []
        self.closed = False

    def add(self, job: Job) -> None:
        """One more; closed at once if it comes too late."""
        self._jobs.append(job)
        if self.closed:
            job.close()

    def when_closed(self, then: Callable[[], None]) -> None:
        """Has something called once the jobs are closed."""
        self._last.append(then)

    def close(self) -> None:
        """Closes them all. May be called again."""
        if not self.closed:
            self.closed = True
            for job in self._jobs:
                job.close()
            for then in self._last:
                then()


class EventStream(Response):
    """A response that is written as a job makes it.

    The client's going away closes the jobs, which ends the events. A failure on the way becomes an event with
    OpenAI's error body, since the status line is long gone; no [DONE] follows it.

    Args:
        jobs: closed when the response is over, however it ends.
        events: the body's events, each a dict for `event`; those that come at once are written at once.
    """

    media_type = "text/event-stream"

    def __init__(self, jobs: Jobs, events: AsyncIterator[list[dict[str, Any]]]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._jobs, self._events = jobs, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes the response; called by the framework."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with closing(self._jobs, receive):
            try:
                async for bodies in self._events:
                    await _write(send, b"".join(map(event, bodies)))
                await _write(send, _DONE)
            except IsobatchError as error:
                await _write(send, event(api_error(error).body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _write(send: Send, data: bytes) -> None:
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await send({"type": "http.response.body", "body": data, "more_body": True})


@contextlib.contextmanager
def closing(jobs: Jobs, receive: Receive) -> Iterator[None]:
    """Closes jobs at the end of the block, or as soon as the client goes away.

    Args:
        jobs: which may become more inside the block.
        receive: of the request, whose body has been read.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        jobs.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        jobs.close()


async def whole(request: Request, job: Job) -> bool:
    """Waits for all replies of a job.

    Returns:
        Whether they are there: False where the client has gone away.

    Raises:
        ServerError, RequestError: as `Job.pieces`.
    """
    with closing(Jobs(job), request.receive):
        return len(await job.whole()) == len(job.prompts)
