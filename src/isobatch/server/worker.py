"""The engine in a thread of its own, and the jobs that the event loop has given it.

The event loop never waits for a step, and the engine never waits for a client. They meet in two places: an
inbox that the thread empties between steps, and one call into the loop after each step with all that it has
produced.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from isobatch.engine.engine import Engine
from isobatch.engine.output import Completion, Reply
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.transcript import Transcript
from isobatch.errors import DeadlineError, EngineDownError, QueueFullError
from isobatch.server.job import Job, Piece

State = Literal["ready", "draining", "failed", "stopped"]
_LOG = logging.getLogger("isobatch.server")


@dataclass(slots=True)
class _Told:
    """How much of a completion is in pieces already."""

    characters: int = 0
    tokens: int = 0
    over: bool = False


@dataclass(slots=True)
class _Live:
    """A prompt of a job in the engine. Only the engine's thread has these."""

    job: Job
    prompt: int
    told: list[_Told] = field(default_factory=list)


class Worker:
    """Runs an engine for the event loop that calls `start`.

    Args:
        engine: used by nobody else from now on.
        max_queue: how many completions may wait beside those that can run at once.
        timeout_s: how long a job may take, waiting included.

    Attributes:
        state: "ready", or why nothing is accepted.
    """

    def __init__(self, engine: Engine, *, max_queue: int, timeout_s: float) -> None:
        self.engine = engine
        self.state: State = "stopped"
        self.most = engine.config.max_batch_sequences + max_queue
        self._timeout_s = timeout_s
        self._jobs: dict[Job, asyncio.TimerHandle] = {}
        self._lock = threading.Condition()
        self._inbox: list[Job] = []
        self._outbox: list[Job] = []
        self._stopping = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="isobatch-engine")

    # In the event loop.

    def start(self) -> None:
        """Begins to serve."""
        self._loop = asyncio.get_running_loop()
        self.state = "ready"
        self._running = self._thread.submit(self._run)
        self._running.add_done_callback(self._ended)

    @property
    def in_flight(self) -> int:
        """Completions asked for and not over."""
        return sum(job.sequences for job in self._jobs)

    @property
    def jobs(self) -> int:
        """Requests that are not over."""
        return len(self._jobs)

    def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, streaming: bool = False
    ) -> Job:
        """Queues a job.

        Args:
            prompts: token ids of each, at least one.
            params: how they are continued.
            streaming: whether pieces are wanted.

        Raises:
            RequestError: a prompt that can never be served; nothing was queued.
            QueueFullError: too many are waiting.
            EngineDownError: nothing is served any more.

        Determinism:
            See `Engine`: what a reply is depends on its prompt and the parameters alone.
        """
        if self.state != "ready":
            raise EngineDownError(f"the engine is {self.state}", fix="try again later")
        for prompt in prompts:
            self.engine.check_request(prompt, params)
        job = Job(prompts, params, streaming=streaming, release=self._release)
        if self.in_flight + job.sequences > self.most:
            raise QueueFullError(
                "too many requests are waiting",
                expected=f"at most {self.most} completions in flight",
                got=f"{self.in_flight}, and {job.sequences} more",
                fix="try again later",
            )
        self._jobs[job] = self._loop.call_later(self._timeout_s, self._expire, job)
        with self._lock:
            self._inbox.append(job)
            self._lock.notify()
        return job

    def _release(self, job: Job) -> None:
        """Forgets a job, and aborts what it has in the engine."""
        timer = self._jobs.pop(job, None)
        if timer is not None:
            timer.cancel()
            if len(job.replies) < len(job.prompts):
                with self._lock:
                    self._outbox.append(job)
                    self._lock.notify()

    def drain(self, grace_s: float) -> None:
        """Accepts nothing more; what is in flight fails after the grace period."""
        if self.state == "ready":
            self.state = "draining"
            self._loop.call_later(grace_s, self._fail_all)

    async def stop(self) -> None:
        """Fails what is in flight, and waits for the thread's last step."""
        if self.state != "failed":
            self.state = "stopped"
        self._fail_all()
        with self._lock:
            self._stopping = True
            self._lock.notify()
        await asyncio.to_thread(self._thread.shutdown)

    def _expire(self, job: Job) -> None:
        job.fail(DeadlineError(f"not done within {self._timeout_s:g} seconds", fix="ask for less, or later"))

    def _fail_all(self) -> None:
        for job in list(self._jobs):
            job.fail(EngineDownError(f"the engine is {self.state}", fix="try again later"))

    def _crashed(self, error: BaseException) -> None:
        self.state = "failed"
        _LOG.error("engine failed", exc_info=error)
        self._fail_all()

    def _deliver(self, news: list[tuple[Job, list[Piece], dict[int, Reply]]]) -> None:
        for job, pieces, replies in news:
            job.take(pieces, replies)

    # In the engine's thread.

    def _ended(self, running: Future[None]) -> None:
        if (error := running.exception()) is not None:
            self._loop.call_soon_threadsafe(self._crashed, error)

    def _run(self) -> None:
        live: dict[int, _Live] = {}
        while True:
            with self._lock:
                while not (self._inbox or self._outbox or live or self._stopping):
                    self._lock.wait()
                came, gone = self._inbox, set(self._outbox)
                self._inbox, self._outbox = [], []
            for number, entry in list(live.items()):
                if entry.job in gone or self._stopping:
                    self.engine.abort(number)
                    del live[number]
            if self._stopping:
                return
            for job in came:
                if job not in gone:
                    for at, prompt in enumerate(job.prompts):
                        told = [_Told() for _ in range(job.params.n)]
                        live[self.engine.add(prompt, job.params)] = _Live(job, at, told)
            if live:
                self._step(live)

    def _step(self, live: dict[int, _Live]) -> None:
        """Runs a step, and tells the loop what came of it."""
        news: dict[Job, tuple[list[Piece], dict[int, Reply]]] = {}
        for reply in self.engine.step():
            entry = live.pop(reply.request_id)
            pieces, replies = news.setdefault(entry.job, ([], {}))
            replies[entry.prompt] = reply
            if entry.job.streaming:
                pieces += (_last(entry, c) for c in reply.completions if not entry.told[c.index].over)
        for number, entry in live.items():
            if entry.job.streaming:
                transcripts = self.engine.transcripts(number)
                new = [piece for t in transcripts if (piece := _next(entry, t)) is not None]
                if new:
                    news.setdefault(entry.job, ([], {}))[0].extend(new)
        if news:
            flat = [(job, pieces, replies) for job, (pieces, replies) in news.items()]
            self._loop.call_soon_threadsafe(self._deliver, flat)


def _next(entry: _Live, transcript: Transcript) -> Piece | None:
    """What a transcript has that was not told yet."""
    sequence = transcript.sequence
    told, known = entry.told[sequence.index], transcript.known
    # Fewer than told where the engine had to begin a request anew: it will say the same again.
    if told.over or known <= told.tokens:
        return None
    text = transcript.told[told.characters :]
    scored = None if sequence.params.logprobs is None else tuple(transcript.log_probs[told.tokens :])
    new, finish = tuple(sequence.output_ids[told.tokens : known]), sequence.finish_reason
    told.characters += len(text)
    told.tokens, told.over = known, finish is not None
    return Piece(entry.prompt, sequence.index, text, new, scored, finish)


def _last(entry: _Live, completion: Completion) -> Piece:
    """What is left of a finished completion."""
    told = entry.told[completion.index]
    scored = None if completion.log_probs is None else completion.log_probs[told.tokens :]
    return Piece(
        entry.prompt,
        completion.index,
        completion.text[told.characters :],
        completion.token_ids[told.tokens :],
        scored,
        completion.finish_reason,
    )
