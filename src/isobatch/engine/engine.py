"""The engine: schedule, run, sample, take in. One `step` at a time, by whoever drives it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as Tokens

from isobatch.config import EngineConfig
from isobatch.engine import sampler
from isobatch.engine.block_pool import BlockPool
from isobatch.engine.inputs import require_tokens
from isobatch.engine.live_request import LiveRequest
from isobatch.engine.memory import kv_blocks, page_tokens
from isobatch.engine.output import Reply
from isobatch.engine.policies import policy_from_name
from isobatch.engine.prefix_cache import PrefixCache
from isobatch.engine.request import PENDING, FinishReason, Sequence
from isobatch.engine.runner import Flight, Result, Runner
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.scheduled import ScheduledStep
from isobatch.engine.scheduler import Scheduler
from isobatch.engine.seeds import seed_for, seed_of
from isobatch.engine.tokenizer import Tokenizer
from isobatch.engine.transcript import Transcript
from isobatch.errors import (
    ConfigError,
    DeviceError,
    InvalidSamplingError,
    OutOfMemoryError,
    RequestError,
    StepMemoryError,
    UnknownRequestError,
)
from isobatch.kernels.layout import Cache
from isobatch.models.config import ModelConfig
from isobatch.models.decoder import Decoder
from isobatch.ops.environment import require_ieee_here
from isobatch.ops.fingerprint import Identity
from isobatch.ops.queued import QueuedOps


def check_settings(model: ModelConfig, config: EngineConfig) -> None:
    """Refuses settings that this model cannot be run with; asked before its weights are loaded.

    Raises:
        ConfigError: the KV cache holds no block, the policy is unknown, or the context is beyond the model's.
    """
    policy_from_name(config.policy)
    kv_blocks(model, config.cache_bytes, config.number_bytes, page_tokens(config))
    longest = model.context_length
    if config.max_context is not None and config.max_context > longest:
        raise ConfigError(
            "max_context is beyond the model's own", expected=f"at most {longest}", got=config.max_context
        )


class Engine:
    """Continuous batching over one model.

    An exception, Ctrl-C above all, may come between any two lines. So the bookkeeping is changed only
    while `_torn` is set, and whoever finds it set begins every live request again (`_start_over`): each is a
    function of its prompt, parameters and seed, so it comes out as it would have. Holding signals back
    instead would take a handler of the whole process, and would not help against MemoryError.

    Args:
        decoder: the model.
        tokenizer: for text and stop strings; None for a model that has none.
        config: how to use the machine.
        identity: of model and numerics, whose fingerprint goes into every reply; None with stock kernels.

    Attributes:
        drafted_tokens: how many guesses have been computed since the engine was made; for reports only.
        accepted_tokens: how many of them were said.

    Raises:
        ConfigError: as `check_settings`.
        FloatEnvironmentError, ForkedProcessError: as `require_ieee`.

    Determinism:
        A reply depends on its prompt, parameters and seed, the weights and the numerics class. Not on the
        other requests, their order, the policy, the batch limits, the size of the cache, or drafts.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        identity: Identity | None = None,
    ) -> None:
        check_settings(decoder.config, config)
        self.decoder = decoder
        self.require_ieee()
        self.tokenizer = tokenizer
        self.config = config
        self.identity = identity
        self.max_context = config.max_context or decoder.config.context_length
        self._blocks = kv_blocks(decoder.config, config.cache_bytes, config.number_bytes, decoder.ops.page)
        sequences = config.max_batch_sequences
        rows = min(sequences * (1 + config.draft_tokens), max(sequences, config.step_tokens))
        decoder.prepare(max(rows, config.step_tokens), rows)
        self._caches = decoder.kv_caches(self._blocks)
        self._runner = Runner(decoder, self._caches, rows, self.max_context)
        self.drafted_tokens = self.accepted_tokens = 0
        self.eos_token_ids = frozenset(tokenizer.eos_token_ids if tokenizer else decoder.config.eos_token_ids)
        self._requests: dict[int, LiveRequest] = {}
        self._down: DeviceError | None = None
        self._ids = itertools.count()
        self._start_over()

    def _start_over(self) -> None:
        """Makes the bookkeeping anew, and queues every live request from its beginning."""
        self._torn = True
        self.pool = BlockPool(self._blocks, self.decoder.ops.page)
        self.scheduler = Scheduler(
            self.pool,
            PrefixCache(self.pool) if self.config.prefix_cache else None,
            policy_from_name(self.config.policy),
            max_batch_tokens=self.config.step_tokens,
            max_batch_sequences=self.config.max_batch_sequences,
            max_context=self.max_context,
            draft_tokens=self.config.draft_tokens,
        )
        self._owner: dict[int, tuple[LiveRequest, Transcript]] = {}
        self._flight: Flight | None = None
        for request in self._requests.values():
            self._queue(request)
        self._torn = False

    def _mend(self) -> None:
        if self._torn:
            self._start_over()

    @property
    def caches(self) -> list[Cache]:
        """Keys and values, a cache per layer; while there is no work, nothing in them is needed."""
        return self._caches

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def require_ieee(self) -> None:
        """Refuses to compute in a process or on a thread that would give other bits than the promised ones.

        Raises:
            FloatEnvironmentError, ForkedProcessError: as they say. Stock kernels promise nothing.
        """
        if self.decoder.ops.name != "stock":
            require_ieee_here()

    def check_request(self, prompt_ids: Tokens[int], params: SamplingParams) -> None:
        """Checks what can be checked of a request before it is added.

        Raises:
            PromptError: token ids that the model does not have, none at all, or too many.
            InvalidSamplingError: parameters that this model cannot serve, or a receipt from stock kernels.
            CapacityError: it would never fit in the KV cache.
        """
        vocabulary = self.decoder.config.vocab_size
        require_tokens(prompt_ids, params, vocabulary, has_text=self.tokenizer is not None)
        if params.receipt and self.identity is None:
            raise InvalidSamplingError("a receipt for what cannot be verified", fix="use certified kernels")
        self.scheduler.require_room(len(prompt_ids), params.max_tokens)

    def new_id(self) -> int:
        """An id for `add`, for a caller who wants to know it before there is anything to abort."""
        return next(self._ids)

    def add(self, prompt_ids: Tokens[int], params: SamplingParams, request_id: int | None = None) -> int:
        """Queues a request.

        Args:
            prompt_ids: token ids of the prompt.
            params: how to continue it.
            request_id: from `new_id`, used once; None for a fresh one.

        Returns:
            The request's id.

        Raises:
            RequestError: it can never be served; nothing was queued.
            DeviceError: the GPU has failed.
        """
        self.check_request(prompt_ids, params)
        if self._down is not None:
            raise self._down
        seed = seed_for(params)
        number = self.new_id() if request_id is None else request_id
        request = LiveRequest(number, tuple(prompt_ids), params, seed)
        self._mend()
        self._torn = True
        if not self._requests:  # what took the memory then may be gone now
            self.scheduler.max_batch_tokens = self.config.step_tokens
        self._queue(request)
        self._requests[number] = request
        self._torn = False
        return number

    def _queue(self, request: LiveRequest) -> None:
        """Queues the n sequences of a request, from their beginning."""
        request.transcripts, request.prompt_log_probs, request.error = [], {}, None
        for index in range(request.params.n):
            number = next(self._ids)
            sequence = Sequence(
                id=number,
                prompt_ids=request.prompt_ids,
                params=request.params,
                seed=seed_of(request.seed, index),
                arrival=number,
                index=index,
            )
            self.scheduler.add(sequence)
            transcript = Transcript(sequence, self.tokenizer.incremental() if self.tokenizer else None)
            request.transcripts.append(transcript)
            self._owner[number] = (request, transcript)

    def abort(self, request_id: int) -> bool:
        """Drops a request and frees its blocks at once.

        Args:
            request_id: any id.

        Returns:
            Whether there was such a request in flight.
        """
        self._mend()
        if request_id not in self._requests:
            return False
        self._torn = True
        for transcript in self._requests.pop(request_id).transcripts:
            self.scheduler.abort(transcript.sequence.id)
            del self._owner[transcript.sequence.id]
        self._torn = False
        return True

    def transcripts(self, request_id: int) -> tuple[Transcript, ...]:
        """What each completion of a request in flight has said, for streaming; to be read only.

        They are the engine's own and grow with each step. After an interruption they are others, begun anew.

        Raises:
            UnknownRequestError: no such request in flight.
        """
        self._mend()
        if request_id not in self._requests:
            raise UnknownRequestError(f"no request {request_id} in flight")
        return tuple(self._requests[request_id].transcripts)

    def step(self, into: dict[int, Reply] | None = None) -> list[Reply]:
        """Runs the model once over whatever the scheduler picked.

        On a device that works through a queue, what this step comes to is seen in the next call, which queues
        its own step first: the device need not wait for the host to read and to plan.

        Args:
            into: gets the replies as well, by id, before the engine forgets them: what no exception on the
                way back can lose.

        Returns:
            The requests that were found to be finished.

        Raises:
            FloatEnvironmentError: the calling thread no longer computes as IEEE 754 says.
            DeviceError: the GPU has failed, in this step or an earlier one. No request of this engine ends.
        """
        if self._down is not None:
            raise self._down
        try:
            return self._step(into)
        except DeviceError as error:
            self._down = error
            raise

    def _step(self, into: dict[int, Reply] | None) -> list[Reply]:
        self.require_ieee()
        self._mend()
        self._torn = True
        before, step = self._flight, self.scheduler.schedule()
        # Nothing changes in here, and most of the time is spent here: a step that failed is planned again,
        # if no other is under way.
        self._torn = before is not None
        flight = None if step is None else self._launch(step, before)
        ahead = flight is not None and self._may_run_ahead(flight)
        landed = [] if before is None else before.results()
        at_once = [] if flight is None or ahead else flight.results()
        self._torn = True
        touched = self._take_all(landed)
        if step is not None and flight is None:
            touched |= self._retreat(step)
        if flight is not None:
            self._commit(flight)
        touched |= self._take_all(at_once)
        self._flight = flight if ahead else None
        limit = self.scheduler.token_limit
        replies = [each.reply(self.identity, limit) for each in touched.values() if each.finished]
        if into is not None:
            into |= {reply.request_id: reply for reply in replies}
        for reply in replies:
            self._forget(self._requests.pop(reply.request_id))
        self._torn = False
        return replies

    def _launch(self, step: ScheduledStep, before: Flight | None) -> Flight | None:
        """The step's flight, or None if the step does not fit in memory; then nothing of it counts."""
        try:
            return self._runner.launch(step, before)
        except OutOfMemoryError:
            return None

    def _retreat(self, step: ScheduledStep) -> dict[int, LiveRequest]:
        """Makes steps smaller until there is no work; fails the request of one that could not be smaller."""
        tokens = sum(chunk.end - chunk.start for chunk in step.chunks)
        if tokens > 1:
            self.scheduler.max_batch_tokens = tokens // 2
            return {}
        (chunk,) = step.chunks
        request, _ = self._owner[chunk.sequence.id]
        if not request.finished:
            fix = "free memory, or make a new engine with a smaller KV cache"
            error = StepMemoryError("not even one token can be computed in the memory there is", fix=fix)
            self._end(request, error)
        return {request.id: request}

    def _end(self, request: LiveRequest, error: RequestError) -> None:
        """Ends a request that has failed; the others go on."""
        request.error = error
        for transcript in request.transcripts:
            if transcript.sequence.finish_reason is None:
                self.scheduler.finish(transcript.sequence, FinishReason.ERROR)

    def _may_run_ahead(self, flight: Flight) -> bool:
        """Whether a step can be planned before the tokens of this one are seen."""
        if self.config.draft_tokens:
            return False  # they are what the next drafts are looked up by
        sampled = (row.sequence for row in flight.rows if row.samples)
        return isinstance(self.decoder.ops, QueuedOps) and not any(map(sampler.needs_history, sampled))

    def _commit(self, flight: Flight) -> None:
        """Counts the step's tokens as computed, and those that it samples as there; drafts only as tried."""
        self.scheduler.commit(flight.step)
        for row in flight.rows:
            if row.drafts:
                self.drafted_tokens += 1
            elif row.samples and row.sequence.finish_reason is None:
                row.sequence.append(PENDING)

    def _take_all(self, results: list[Result]) -> dict[int, LiveRequest]:
        """Records results. Returns the requests they belong to, without those that are over already."""
        touched = {}
        for result in results:
            row = result.row
            if row.sequence.finish_reason is None and (not row.drafts or row.counts):
                request = self._take_in(result)
                touched[request.id] = request
        return touched

    def _take_in(self, result: Result) -> LiveRequest:
        """Records one row's result, and ends what is over. Returns the request it belongs to."""
        sequence = result.row.sequence
        request, transcript = self._owner[sequence.id]
        entry = result.entry
        if result.token < 0 or (entry is not None and not math.isfinite(entry.log_prob)):
            self._end(request, request.unfinite(result.row.position))
            return request
        if not result.row.samples:
            if entry is not None:
                request.prompt_log_probs[result.row.position] = entry
            return request
        if result.row.drafts:
            self.scheduler.accept(sequence)
            self.accepted_tokens += 1
            sequence.append(PENDING)
        sequence.resolve(result.token)
        if entry is not None:
            transcript.log_probs.append(entry)
        if result.digest is not None:
            transcript.row_digests.append(result.digest)
        reason = transcript.push(result.token, self.eos_token_ids, self.scheduler.token_limit(sequence))
        if reason is not None:
            self.scheduler.finish(sequence, reason)
        return request

    def _forget(self, request: LiveRequest) -> None:
        for transcript in request.transcripts:
            del self._owner[transcript.sequence.id]
