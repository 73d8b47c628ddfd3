"""What the page asks: copies of one prompt while other traffic comes and goes, in one stream of events.

One request, because a browser opens no more than six connections to a server. Each copy goes the way that a
request of its own would go.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import IsobatchError
from isobatch.server.body import OnceRoute
from isobatch.server.errors import api_error
from isobatch.server.job import Job
from isobatch.server.models import Served, pick
from isobatch.server.protocol import AskRequest
from isobatch.server.replies import Dict
from isobatch.server.stream import EventStream, Jobs

router = APIRouter(route_class=OnceRoute)

_TRAFFIC = (
    "Why is the sky blue?",
    "Name three rivers in Europe.",
    "What does a compiler do?",
    "Write a sentence about the sea.",
    "What is the capital of Japan?",
    "Explain photosynthesis to a child in a few simple sentences, without difficult words.",
    "Give me a recipe for pancakes with the ingredients first and then every step in order.",
)
_SPREAD_S = 2.0
"""Copies and traffic arrive at random within so many seconds."""


@router.post("/playground")
async def ask(body: AskRequest, request: Request) -> Response:
    """Asks once alone, then many times under load, and streams what comes back."""
    served = pick(request.app.state.models, body.model)
    params = SamplingParams(temperature=body.temperature, seed=body.seed, max_tokens=body.max_tokens)
    prompt = await served.encode_chat([{"role": "user", "content": body.prompt}])
    served.llm.engine.check_request(prompt, params)
    jobs = Jobs()
    return EventStream(jobs, _Experiment(served, body, prompt, params, jobs).events())


class _Experiment:
    """One press of the button.

    Args:
        served: the model.
        body: what was asked.
        prompt: its tokens.
        params: of every copy.
        jobs: gets what is asked of the engine, to be closed by the response.
    """

    def __init__(
        self, served: Served, body: AskRequest, prompt: list[int], params: SamplingParams, jobs: Jobs
    ) -> None:
        self._served, self._body, self._prompt, self._params = served, body, prompt, params
        self._jobs = jobs
        self._answers: set[tuple[int, ...]] = set()
        self._events: asyncio.Queue[Dict | None] = asyncio.Queue()

    async def events(self) -> AsyncIterator[list[Dict]]:
        """Pieces of the copies, "alone" first; at the end how many different answers there were."""
        yield [{"fingerprint": self._served.llm.fingerprint, "prompt_tokens": self._prompt}]
        self._jobs.when_closed(self._end)
        running = asyncio.create_task(self._run())
        try:
            while (event := await self._events.get()) is not None:
                yield [event]
            if self._jobs.closed:
                return
            await running
        finally:
            running.cancel()
        yield [{"done": True, "distinct": len(self._answers)}]

    async def _run(self) -> None:
        try:
            await self._copy("alone", 0.0, receipt=self._served.llm.fingerprint is not None)
            # The same arrivals each time, as far as a clock can tell: both kinds of kernels meet one load.
            rng = random.Random(self._body.seed)
            async with asyncio.TaskGroup() as group:
                for cell in range(self._body.copies):
                    group.create_task(self._copy(cell, rng.uniform(0, _SPREAD_S)))
                for _ in range(self._body.others):
                    group.create_task(self._other(rng))
        finally:
            self._end()

    def _end(self) -> None:
        self._events.put_nowait(None)

    def _submit(self, prompt: list[int], params: SamplingParams) -> Job:
        job = self._served.worker.submit([prompt], params, streaming=True)
        self._jobs.add(job)
        return job

    async def _copy(self, cell: int | str, delay_s: float, *, receipt: bool = False) -> None:
        await asyncio.sleep(delay_s)
        words = self._served.words
        try:
            job = self._submit(self._prompt, replace(self._params, receipt=receipt))
            async for pieces in job.pieces():
                for piece in pieces:
                    tokens = [[token, words.text(token)] for token in piece.tokens]
                    over = piece.finish is not None
                    self._events.put_nowait(
                        {"cell": cell, "text": piece.text, "tokens": tokens, "over": over}
                    )
        except IsobatchError as error:
            self._events.put_nowait({"cell": cell} | api_error(error).body())
        else:
            messages = [{"role": "user", "content": self._body.prompt}]
            for reply in job.replies.values():
                for completion in reply.asked_as(messages=messages).completions:
                    if completion.receipt is not None:
                        self._events.put_nowait({"receipt": completion.receipt.as_dict()})
            self._answers |= {c.token_ids for reply in job.replies.values() for c in reply.completions}

    async def _other(self, rng: random.Random) -> None:
        # Drawn before anything is awaited, so that the order of the draws is that of the tasks.
        delay_s, text = rng.uniform(0, _SPREAD_S), rng.choice(_TRAFFIC)
        length, seed = rng.randint(4, self._body.max_tokens + 3), rng.getrandbits(32)
        prompt = await self._served.encode_chat([{"role": "user", "content": text}])
        await asyncio.sleep(delay_s)
        try:
            job = self._submit(prompt, SamplingParams(seed=seed, max_tokens=length))
            async for _ in job.pieces():
                pass
        except IsobatchError:
            return  # traffic is only there to keep the engine busy
