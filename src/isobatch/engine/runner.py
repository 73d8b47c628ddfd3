"""Runs a planned step: from its chunks to tokens, log-probabilities and digests of logits.

On a device that works through a queue, `launch` only fills it; what comes of a step is read from its flight,
when it is asked for. So a step can be queued behind one whose tokens nobody has seen yet: a chunk that ends
in such a token gets it on the device, from the flight before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch

from isobatch.engine import sampler
from isobatch.engine.batch import LogitRow, build_batch, meanings
from isobatch.engine.chunk_graphs import ChunkGraphs
from isobatch.engine.graphs import Computed, DecodeGraphs, Pending
from isobatch.engine.output import TokenLogProbs
from isobatch.engine.receipt import row_digests
from isobatch.engine.request import PENDING
from isobatch.engine.scheduled import ScheduledStep
from isobatch.errors import DeviceError, IntegrityError, OutOfMemoryError
from isobatch.kernels.layout import Cache
from isobatch.models.decoder import Decoder
from isobatch.ops.queued import QueuedOps


@dataclass(frozen=True, slots=True)
class Result:
    """What one row of logits came to.

    Args:
        row: its meaning.
        token: chosen, or known already from the prompt; -1 where the logits hold NaN or infinity.
        entry: the token's log-probabilities, if the request wants them.
        digest: of the row, if the request wants a receipt.
    """

    row: LogitRow
    token: int
    entry: TokenLogProbs | None
    digest: bytes | None


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that has been queued.

    Args:
        step: as planned.
        rows: what its rows of logits are for.
        tokens: int64 [S] on the device, of the rows that sample.
        results: waits, and says what each row came to.
    """

    step: ScheduledStep
    rows: tuple[LogitRow, ...]
    tokens: torch.Tensor | None
    results: Callable[[], list[Result]]

    def sampled(self) -> dict[int, int]:
        """For each sequence that was sampled, its place among the tokens."""
        sampling = (row.sequence.id for row in self.rows if row.samples)
        return {number: at for at, number in enumerate(sampling)}


class Runner:
    """A decoder with its caches.

    Args:
        decoder: the model.
        caches: one per layer.
        max_rows: the most rows of a step that is all decode.
        max_context: the most tokens of a sequence.
    """

    def __init__(self, decoder: Decoder, caches: Sequence[Cache], max_rows: int, max_context: int) -> None:
        self._decoder = decoder
        self._caches = caches
        ops = decoder.ops
        self._decode: DecodeGraphs | None = None
        self._chunks: ChunkGraphs | None = None
        if isinstance(ops, QueuedOps):
            self._decode = DecodeGraphs(decoder, ops, caches, max_rows, max_context)
            if (tiling := ops.tiling) is not None:
                self._chunks = ChunkGraphs(decoder, ops, tiling, caches, self._decode.tables)

    def launch(self, step: ScheduledStep, before: Flight | None = None) -> Flight:
        """Queues a step.

        Args:
            step: the plan.
            before: the flight that knows what tokens are pending; None if none are.

        Returns:
            Its flight.

        Raises:
            IntegrityError: a token is pending that the flight before does not have.
            OutOfMemoryError: the step does not fit in the device's memory. It can be queued again.
            DeviceError: the device has failed.

        Determinism:
            Results depend on each sequence's own tokens, parameters and seed.
        """
        pending, rows = _pending(step, before), meanings(step)
        with device_errors():
            return self._read(step, rows, self._compute(step, rows, pending))

    def _compute(self, step: ScheduledStep, rows: tuple[LogitRow, ...], pending: Pending | None) -> Computed:
        ops = self._decoder.ops
        if not ops.watched:  # a replay calls no op, and observers are to see each call
            computed = None
            if self._decode is not None and self._decode.fits(step):
                computed = self._decode.run(step, rows, pending)
            elif self._chunks is not None:
                computed = self._chunks.run(step, pending)
            if computed is not None:
                return computed
        batch = build_batch(step, ops)
        if pending is not None:
            ends = list(accumulate(chunk.end - chunk.start for chunk in step.chunks))
            at, places = ops.tensor([[ends[i] - 1 for i in pending.places], [*pending.places.values()]])
            # -1 stands for a row that was refused: its request fails when that is read, any token will do.
            batch.token_ids.index_copy_(0, at, pending.sampled.index_select(0, places).clamp(min=0))
        return Computed(logits=self._decoder(batch, self._caches))

    def _read(self, step: ScheduledStep, rows: tuple[LogitRow, ...], computed: Computed) -> Flight:
        """Queues all that is to be known of the logits, if tokens are not all, and are there already."""
        ops = self._decoder.ops
        sampling = [i for i, row in enumerate(rows) if row.samples]
        tokens, logits = computed.tokens, computed.logits
        if logits is not None and sampling:
            tokens = sampler.draw(ops, _rows(logits, sampling), [rows[i] for i in sampling])
        arrived = None if tokens is None else ops.fetch(tokens)
        known = [-1 if row.samples else row.sequence.prompt_ids[row.position] for row in rows]
        counts = [
            row.sequence.params.logprobs if row.samples else row.sequence.params.prompt_logprobs
            for row in rows
        ]
        wanted = [i for i, count in enumerate(counts) if count is not None]
        entries: Callable[[], list[TokenLogProbs]] = list
        if logits is not None and wanted:
            chosen = ops.tensor(known)
            if tokens is not None:
                # A row that was refused has no token; what is said of token 0 instead, nobody will read.
                chosen.index_copy_(0, ops.tensor(sampling), tokens.clamp(min=0))
            asked = [counts[i] or 0 for i in wanted]
            entries = sampler.log_probs(ops, _rows(logits, wanted), _rows(chosen, wanted), asked)
        receipted = [i for i in sampling if rows[i].sequence.params.receipt]
        digested = None
        if logits is not None and receipted:
            digested = ops.fetch(_rows(logits, receipted))

        @device_errors()
        def results() -> list[Result]:
            if arrived is not None:
                for i, token in zip(sampling, arrived().tolist(), strict=True):
                    known[i] = token
            said = dict(zip(wanted, entries(), strict=True))
            digests = dict(zip(receipted, row_digests(digested()), strict=True)) if digested else {}
            return [Result(row, known[i], said.get(i), digests.get(i)) for i, row in enumerate(rows)]

        return Flight(step, rows, tokens, results)


@contextmanager
def device_errors() -> Iterator[None]:
    """Turns torch's errors of a device into ours.

    Raises:
        OutOfMemoryError, DeviceError: for what torch says of memory, and of the device.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError("a step that does not fit in the device's memory", got=error) from error
    except torch.AcceleratorError as error:
        raise DeviceError("the GPU has failed", got=error, fix="start a new process") from error


def _rows(tensor: torch.Tensor, at: list[int]) -> torch.Tensor:
    """Some rows, without a copy if it is all of them."""
    return tensor if len(at) == len(tensor) else tensor[at]


def _pending(step: ScheduledStep, before: Flight | None) -> Pending | None:
    """The chunks of a step that end in a token which nobody has seen yet; None if there are none."""
    waiting = {
        at: chunk.sequence.id for at, chunk in enumerate(step.chunks) if chunk.token_ids[-1] == PENDING
    }
    if not waiting:
        return None
    if before is None or before.tokens is None:
        raise IntegrityError("tokens are pending that no step samples")
    known = before.sampled()
    if strange := set(waiting.values()) - set(known):
        raise IntegrityError(f"sequences {sorted(strange)} have a pending token that nobody samples")
    return Pending(before.tokens, {at: known[number] for at, number in waiting.items()})
