"""Runs a planned step: from its chunks to tokens, log-probabilities and digests of logits.

On a device that works through a queue, `launch` only fills it; what comes of a step is read from its flight,
when it is asked for. So a step can be queued behind one whose tokens nobody has seen yet: a chunk that ends
in such a token gets it on the device, from the flight before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from isobatch.engine import sampler
from isobatch.engine.batch import LogitRow, build_batch, meanings
from isobatch.engine.graphs import DecodeGraphs
from isobatch.engine.output import TokenLogProbs
from isobatch.engine.receipt import row_digests
from isobatch.engine.request import PENDING
from isobatch.engine.scheduled import ScheduledStep
from isobatch.errors import IntegrityError
from isobatch.kernels.layout import Cache
from isobatch.models.decoder import Decoder
from isobatch.ops import Ops
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
        self._graphs = (
            DecodeGraphs(decoder, ops, caches, max_rows, max_context) if isinstance(ops, QueuedOps) else None
        )

    def launch(self, step: ScheduledStep, before: Flight | None = None) -> Flight:
        """Queues a step.

        Args:
            step: the plan.
            before: the flight that knows what tokens are pending; None if none are.

        Returns:
            Its flight.

        Raises:
            IntegrityError: a token is pending that the flight before does not have.

        Determinism:
            Results depend on each sequence's own tokens, parameters and seed.
        """
        patch = _patch(self._decoder.ops, step, before)
        rows = meanings(step)
        # A replay calls no op, and observers are to see each call.
        if self._graphs is not None and not self._decoder.ops.watched and self._graphs.fits(step):
            logits = self._graphs.run(step, patch)
        else:
            batch = build_batch(step, self._decoder.ops)
            if patch is not None:
                patch(batch.token_ids)
            logits = self._decoder(batch, self._caches)
        return self._read(step, rows, logits)

    def _read(self, step: ScheduledStep, rows: tuple[LogitRow, ...], logits: torch.Tensor) -> Flight:
        """Queues all that is to be known of the logits."""
        ops = self._decoder.ops
        sampling = [i for i, row in enumerate(rows) if row.samples]
        tokens = None
        if sampling:
            tokens = sampler.draw(ops, _rows(logits, sampling), [rows[i] for i in sampling])
        arrived = None if tokens is None else ops.fetch(tokens)
        known = [-1 if row.samples else row.sequence.prompt_ids[row.position] for row in rows]
        counts = [
            row.sequence.params.logprobs if row.samples else row.sequence.params.prompt_logprobs
            for row in rows
        ]
        wanted = [i for i, count in enumerate(counts) if count is not None]
        entries: Callable[[], list[TokenLogProbs]] = list
        if wanted:
            chosen = ops.tensor(known)
            if tokens is not None:
                # A row that was refused has no token; what is said of token 0 instead, nobody will read.
                chosen.index_copy_(0, ops.tensor(sampling), tokens.clamp(min=0))
            asked = [counts[i] or 0 for i in wanted]
            entries = sampler.log_probs(ops, _rows(logits, wanted), _rows(chosen, wanted), asked)
        receipted = [i for i in sampling if rows[i].sequence.params.receipt]
        digested = ops.fetch(_rows(logits, receipted)) if receipted else None

        def results() -> list[Result]:
            if arrived is not None:
                for i, token in zip(sampling, arrived().tolist(), strict=True):
                    known[i] = token
            said = dict(zip(wanted, entries(), strict=True))
            digests = dict(zip(receipted, row_digests(digested()), strict=True)) if digested else {}
            return [Result(row, known[i], said.get(i), digests.get(i)) for i, row in enumerate(rows)]

        return Flight(step, rows, tokens, results)


def _rows(tensor: torch.Tensor, at: list[int]) -> torch.Tensor:
    """Some rows, without a copy if it is all of them."""
    return tensor if len(at) == len(tensor) else tensor[at]


def _patch(ops: Ops, step: ScheduledStep, before: Flight | None) -> Callable[[torch.Tensor], object] | None:
    """What writes pending tokens into the token ids of a step; None if none are pending."""
    ends, sources, at = [], [], 0
    places = None
    for chunk in step.chunks:
        at += len(chunk.token_ids)
        if chunk.token_ids[-1] != PENDING:
            continue
        if places is None:
            places = {} if before is None else before.sampled()
        if chunk.sequence.id not in places:
            raise IntegrityError(f"sequence {chunk.sequence.id} has a pending token that nobody samples")
        ends.append(at - 1)
        sources.append(places[chunk.sequence.id])
    if not ends or before is None or before.tokens is None:
        return None
    places_in_step, places_in_tokens = ops.tensor([ends, sources])
    # -1 stands for a row that was refused: its request fails when that is read, and any token will do.
    tokens = before.tokens.index_select(0, places_in_tokens).clamp(min=0)
    return lambda token_ids: token_ids.index_copy_(0, places_in_step, tokens)
