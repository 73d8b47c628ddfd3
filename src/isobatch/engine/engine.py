"""The engine: schedule, run, sample, take in. One `step` at a time, by whoever drives it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import torch

from isobatch.config import EngineConfig
from isobatch.engine import sampler
from isobatch.engine.batch import LogitRow, build_batch
from isobatch.engine.block_pool import BlockPool
from isobatch.engine.memory import kv_blocks
from isobatch.engine.output import Reply, TokenLogProbs
from isobatch.engine.policies import policy_from_name
from isobatch.engine.prefix_cache import PrefixCache
from isobatch.engine.request import FinishReason, Sequence
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.scheduler import Scheduler
from isobatch.engine.seeds import drawn_seed, seed_of
from isobatch.engine.tokenizer import Tokenizer
from isobatch.engine.transcript import Transcript
from isobatch.errors import (
    ConfigError,
    InvalidSamplingError,
    NonFiniteLogitsError,
    PromptError,
    RequestError,
    UnknownRequestError,
)
from isobatch.kernels.layout import PAGE
from isobatch.models.decoder import Decoder


@dataclass(slots=True)
class _Request:
    """A request in flight."""

    id: int
    prompt_ids: tuple[int, ...]
    transcripts: list[Transcript]
    prompt_log_probs: dict[int, TokenLogProbs] = field(default_factory=dict)
    error: RequestError | None = None

    @property
    def finished(self) -> bool:
        return all(t.sequence.finish_reason is not None for t in self.transcripts)


@dataclass(frozen=True, slots=True)
class _Result:
    """What one row of logits came to.

    Args:
        row: its meaning.
        token: chosen, or known already from the prompt; -1 where the logits hold NaN or infinity.
        entry: the token's log-probabilities, if the request wants them.
    """

    row: LogitRow
    token: int
    entry: TokenLogProbs | None


def _rows(logits: torch.Tensor, at: list[int]) -> torch.Tensor:
    """Some rows of the logits, without a copy if it is all of them."""
    return logits if len(at) == len(logits) else logits[at]


class Engine:
    """Continuous batching over one model.

    Args:
        decoder: the model.
        tokenizer: for text and stop strings; None for a model that has none.
        config: how to use the machine.
        fingerprint: goes into every reply; None with stock kernels.

    Raises:
        ConfigError: the KV cache holds no block, or the policy is unknown.

    Determinism:
        A reply depends on its prompt, parameters and seed, the weights and the numerics class. Not on the
        other requests, their order, the policy, the batch limits, or the size of the cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        fingerprint: str | None = None,
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.config = config
        self.fingerprint = fingerprint
        longest = decoder.config.context_length
        if config.max_context is not None and config.max_context > longest:
            raise ConfigError(
                "max_context is beyond the model's own", expected=f"at most {longest}", got=config.max_context
            )
        self.max_context = config.max_context or longest
        blocks = kv_blocks(decoder.config, config.kv_cache_bytes)
        self.pool = BlockPool(blocks, PAGE)
        self.scheduler = Scheduler(
            self.pool,
            PrefixCache(self.pool) if config.prefix_cache else None,
            policy_from_name(config.policy),
            max_batch_tokens=config.max_batch_tokens,
            max_batch_sequences=config.max_batch_sequences,
            max_context=self.max_context,
        )
        self._caches = decoder.kv_caches(blocks)
        self._eos = frozenset(tokenizer.eos_token_ids if tokenizer else decoder.config.eos_token_ids)
        self._requests: dict[int, _Request] = {}
        self._owner: dict[int, tuple[_Request, Transcript]] = {}
        self._ids = itertools.count()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def check_request(self, prompt_ids: Tokens[int], params: SamplingParams) -> None:
        """Checks what can be checked of a request before it is added.

        Raises:
            PromptError: token ids that the model does not have.
            InvalidSamplingError: parameters that this model cannot serve.
        """
        vocabulary = self.decoder.config.vocab_size
        strange = [t for t in prompt_ids if type(t) is not int or not 0 <= t < vocabulary]
        if strange:
            raise PromptError(
                "a prompt with tokens that the model does not have",
                expected=f"integers from 0 to {vocabulary - 1}",
                got=repr(strange[0]),
                fix="tokenize with this model's own tokenizer",
            )
        if params.stop and self.tokenizer is None:
            raise InvalidSamplingError(
                "stop strings for a model without a tokenizer", fix="use stop_token_ids instead"
            )

    def add(self, prompt_ids: Tokens[int], params: SamplingParams) -> int:
        """Queues a request.

        Args:
            prompt_ids: token ids of the prompt.
            params: how to continue it.

        Returns:
            The request's id.

        Raises:
            RequestError: it can never be served; nothing was queued.
        """
        self.check_request(prompt_ids, params)
        seed = drawn_seed() if params.seed is None else params.seed
        request = _Request(next(self._ids), tuple(prompt_ids), [])
        for index in range(params.n):
            number = next(self._ids)
            sequence = Sequence(
                id=number,
                prompt_ids=request.prompt_ids,
                params=params,
                seed=seed_of(seed, index),
                arrival=number,
                index=index,
            )
            # All n have the same length, so the scheduler refuses the first or none.
            self.scheduler.add(sequence)
            transcript = Transcript(sequence, self.tokenizer.incremental() if self.tokenizer else None)
            request.transcripts.append(transcript)
            self._owner[number] = (request, transcript)
        self._requests[request.id] = request
        return request.id

    def abort(self, request_id: int) -> bool:
        """Drops a request and frees its blocks at once.

        Args:
            request_id: any id.

        Returns:
            Whether there was such a request in flight.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        for transcript in request.transcripts:
            self.scheduler.abort(transcript.sequence.id)
            self._owner.pop(transcript.sequence.id, None)
        return True

    def text_so_far(self, request_id: int) -> tuple[str, ...]:
        """The text of each completion of a request in flight, for streaming.

        Raises:
            UnknownRequestError: no such request in flight.
        """
        if request_id not in self._requests:
            raise UnknownRequestError(f"no request {request_id} in flight")
        return tuple(t.text for t in self._requests[request_id].transcripts)

    def step(self) -> list[Reply]:
        """Runs the model once over whatever the scheduler picked.

        Returns:
            The requests that this step finished.
        """
        step = self.scheduler.schedule()
        if step is None:
            return []
        batch, meanings = build_batch(step)
        logits = self.decoder(batch, self._caches)
        # All that can fail comes before the first change: a step that failed is simply planned again.
        results = self._read(logits, meanings)
        self.scheduler.commit(step)
        touched = {}
        for result in results:
            if result.row.sequence.finish_reason is None:
                request = self._take_in(result)
                touched[request.id] = request
        return [self._reply(request) for request in touched.values() if request.finished]

    def _read(self, logits: torch.Tensor, rows: list[LogitRow]) -> list[_Result]:
        """What the logits say: a token for each row, chosen or known, and log-probabilities where wanted."""
        ops = self.decoder.ops
        tokens = [-1 if row.samples else row.sequence.prompt_ids[row.position] for row in rows]
        at = [i for i, row in enumerate(rows) if row.samples]
        if at:
            chosen = sampler.choose(ops, _rows(logits, at), [rows[i].sequence for i in at])
            for i, token in zip(at, chosen, strict=True):
                tokens[i] = token
        counts = [
            row.sequence.params.logprobs if row.samples else row.sequence.params.prompt_logprobs
            for row in rows
        ]
        wanted = [(i, count) for i, count in enumerate(counts) if count is not None and tokens[i] >= 0]
        entries: dict[int, TokenLogProbs] = {}
        if wanted:
            at = [i for i, _ in wanted]
            asked = [(tokens[i], count) for i, count in wanted]
            entries = dict(zip(at, sampler.log_probs(ops, _rows(logits, at), asked), strict=True))
        return [_Result(row, tokens[i], entries.get(i)) for i, row in enumerate(rows)]

    def _take_in(self, result: _Result) -> _Request:
        """Records one row's result, and ends what is over. Returns the request it belongs to."""
        sequence = result.row.sequence
        request, transcript = self._owner[sequence.id]
        entry = result.entry
        if result.token < 0 or (entry is not None and not math.isfinite(entry.log_prob)):
            self._fail(request, result.row.position)
            return request
        if not result.row.samples:
            if entry is not None:
                request.prompt_log_probs[result.row.position] = entry
            return request
        sequence.append(result.token)
        if entry is not None:
            transcript.log_probs.append(entry)
        reason = transcript.push(result.token, self._eos, self.scheduler.token_limit(sequence))
        if reason is not None:
            self.scheduler.finish(sequence, reason)
        return request

    def _fail(self, request: _Request, position: int) -> None:
        """Ends a request whose logits are not numbers; the others go on."""
        request.error = NonFiniteLogitsError(
            f"the model gave NaN or infinity for position {position} of request {request.id}",
            expected="finite logits",
            fix="check the weights for NaN and the penalties for extremes; no token was made up",
        )
        for transcript in request.transcripts:
            if transcript.sequence.finish_reason is None:
                self.scheduler.finish(transcript.sequence, FinishReason.ERROR)

    def _reply(self, request: _Request) -> Reply:
        del self._requests[request.id]
        for transcript in request.transcripts:
            del self._owner[transcript.sequence.id]
        first = request.transcripts[0].sequence
        prompt_log_probs = None
        if first.params.prompt_logprobs is not None and request.error is None:
            positions = range(1, len(request.prompt_ids))
            prompt_log_probs = tuple(request.prompt_log_probs[p] for p in positions)
        return Reply(
            request_id=request.id,
            prompt_token_ids=request.prompt_ids,
            completions=tuple(t.completion() for t in request.transcripts),
            prompt_log_probs=prompt_log_probs,
            cached_tokens=first.cached_tokens,
            fingerprint=self.fingerprint,
            error=request.error,
        )
