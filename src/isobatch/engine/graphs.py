"""Decode steps as CUDA graphs: a recording for each size of a ladder of batches, replayed with any contents.

A step of decode launches hundreds of kernels that take microseconds each; queued one by one, the host takes
longer than the device. Recorded, they are one launch. A recording reads its inputs where they lay when it was
made. So they lie in memory that all recordings share, padded to the size of a rung: a padded row has context
length 0 and no slot, reads nothing and writes nothing.

Of few rows the choice of tokens is recorded too, where nobody wants to see their logits. Of many it is not:
logits of a thousand rows take hundreds of megabytes, and what is queued behind a long step costs little.

A draft is a row like any other, over its sequence's blocks and with a context one longer than that of the
row before it: in each layer all rows write their keys before any is read. Drafts lie behind all known tokens,
which so keep their rows, and their block tables, from step to step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from isobatch.engine import sampler
from isobatch.engine.batch import LogitRow
from isobatch.engine.block_tables import BlockTables
from isobatch.engine.graph_inputs import KNOWN, PLACES, TOKENS, Form, GraphInputs, Section, token_sections
from isobatch.engine.scheduled import Chunk, ScheduledStep
from isobatch.kernels.layout import Cache
from isobatch.kernels.sampling.cpu import SamplingRows
from isobatch.models.decoder import Decoder
from isobatch.models.inputs import Batch
from isobatch.ops.queued import QueuedOps

# Up to this many rows a recording for each doubling of the context, on which attention's member depends then.
_FEW = 16
_SHORT = 256
DRAWN = 128
"""Up to this many rows tokens are chosen in the recording."""


@dataclass(frozen=True, slots=True)
class Computed:
    """What a recorded step comes to: one of the two.

    Args:
        logits: float32 [S, V].
        tokens: int64 [S], chosen already.
    """

    logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Pending:
    """Tokens that have been sampled on the device and are not known here yet.

    Args:
        sampled: int64 on the device: all that the step before has sampled.
        places: for each chunk that ends in such a token, by its number in the step, the place among these.
    """

    sampled: torch.Tensor
    places: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class _Size:
    """What a recording is made for.

    Args:
        rows: padded ones included.
        context: which no row's exceeds.
        drawn: what `sampler.kind` says of rows whose tokens are chosen in it; None if they are not.
    """

    rows: int
    context: int
    drawn: tuple[bool, bool] | None


Recording = tuple[Callable[[], object], torch.Tensor]
"""What queues recorded work, and its result."""


def recording(record: Callable[[], Recording]) -> Recording | None:
    """A recording, or None if there is no memory for it: the step is queued kernel by kernel then."""
    try:
        return record()
    except torch.OutOfMemoryError:
        return None


def ladder(most: int) -> tuple[int, ...]:
    """Batch sizes that are recorded, the last at least `most`: a sixteenth to a quarter apart."""
    rungs = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32)]
    while rungs[-1] < most:
        rungs.append((rungs[-1] // 64 + 1) * 64)
    return tuple(rungs[: bisect_left(rungs, most) + 1])


class DecodeGraphs:
    """The recordings, made when first needed.

    Args:
        decoder: the model.
        ops: its own.
        caches: one per layer.
        max_rows: the most rows of a step.
        max_context: the most tokens of a sequence.

    Attributes:
        tables: the block tables, a row for each row of a step.
    """

    def __init__(
        self, decoder: Decoder, ops: QueuedOps, caches: Sequence[Cache], max_rows: int, max_context: int
    ) -> None:
        self._decoder, self._ops, self._caches = decoder, ops, caches
        self._rungs = ladder(max_rows)
        self._max_context = max_context
        most = self._rungs[-1]
        self.tables = BlockTables(ops, most, -(-max_context // ops.page))
        self._inputs = GraphInputs(ops, [_form(most), _form(min(most, DRAWN), drawn=True)])
        self._recorded: dict[_Size, Recording | None] = {}

    def fits(self, step: ScheduledStep) -> bool:
        """Whether the step is all decode: one token of each sequence, whose logits are wanted, and drafts."""
        return sum(1 + len(chunk.drafts) for chunk in step.chunks) <= self._rungs[-1] and all(
            chunk.samples and len(chunk.token_ids) == 1 and chunk.start >= len(chunk.sequence.prompt_ids)
            for chunk in step.chunks
        )

    def run(
        self, step: ScheduledStep, rows: Sequence[LogitRow], pending: Pending | None = None
    ) -> Computed | None:
        """Queues a step that fits.

        Args:
            step: the plan.
            rows: what its rows of logits are for.
            pending: tokens of it that are not known here yet.

        Returns:
            What it comes to, a sequence's drafts behind its token, which lasts until the next step is queued;
            None, and nothing was queued, if there is no memory for a recording.
        """
        queue = self.ready(step, rows, pending)
        return None if queue is None else queue()

    def ready(
        self, step: ScheduledStep, rows: Sequence[LogitRow], pending: Pending | None = None
    ) -> Callable[[], Computed] | None:
        """Brings what a step that fits reads to where its recording looks for it.

        Args: as of `run`.

        Returns:
            What queues the step; again and again, until another step is made ready, and as long as
            `pending.sampled` holds what it does now. None as of `run`.
        """
        chunks, page = step.chunks, self._ops.page
        # Of each draft the chunk; of each row the chunk's table, and the position.
        owners = [at for at, chunk in enumerate(chunks) for _ in chunk.drafts]
        places = [(chunk.block_table, chunk.start) for chunk in chunks]
        places += [(c.block_table, p) for c in chunks if c.drafts for p in range(c.stop, c.end)]
        count = len(places)
        size = self._size(count, max(position for _, position in places) + 1, rows)
        if size not in self._recorded:
            self._recorded[size] = recording(lambda: self._record(size))
        if (recorded := self._recorded[size]) is None:
            return None
        tokens = [max(0, chunk.token_ids[0]) for chunk in chunks]
        numbers: dict[str, Sequence[float]] = {
            TOKENS: [*tokens, *chain.from_iterable(chunk.drafts for chunk in chunks)],
            PLACES: [pending.places.get(at, KNOWN) for at in range(count)] if pending else [],
            "positions": [position for _, position in places],
            "slots": [table[position // page] * page + position % page for table, position in places],
            "lengths": [position + 1 for _, position in places],
        }
        if size.drawn is not None:
            numbers |= sampler.columns(rows)
        form = _form(size.rows, drawn=size.drawn is not None)
        self._inputs.send(form, numbers)
        self.tables.show([chunk.block_table for chunk in chunks])
        self.tables.repeat(owners, len(chunks))
        replay, result = recorded
        order = self._order(chunks) if owners else slice(count)

        def queue() -> Computed:
            self._inputs.fill_in(form, None if pending is None else pending.sampled)
            replay()
            if size.drawn is not None:
                return Computed(tokens=result[:count])
            return Computed(logits=self._decoder.logits(result[order]))

        return queue

    def _size(self, rows: int, context: int, meanings: Sequence[LogitRow]) -> _Size:
        """The recording for a step of so many rows, whose contexts are at most `context`."""
        rung = self._rungs[bisect_left(self._rungs, rows)]
        if context <= _SHORT:
            bound = _SHORT
        else:
            bound = 1 << (context - 1).bit_length() if rung <= _FEW else self._max_context
        drawn = rung <= DRAWN and not any(map(sampler.needs_logits, meanings))
        return _Size(rung, min(bound, self._max_context), sampler.kind(meanings) if drawn else None)

    def _order(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The rows, each sequence's drafts behind its token."""
        order, behind = [], len(chunks)
        for row, chunk in enumerate(chunks):
            order += [row, *range(behind, behind + len(chunk.drafts))]
            behind += len(chunk.drafts)
        return self._ops.tensor(order)

    def _record(self, size: _Size) -> Recording:
        ops, form = self._ops, _form(size.rows, drawn=size.drawn is not None)
        # The run that goes before the recording is of padded rows alone: it writes nothing.
        self._inputs.send(form, {})
        at, token_ids = self._inputs.views(form), self._inputs.token_ids(form)
        tables = self.tables.tensor[: size.rows]
        rows = ops.decode_rows(at["lengths"], tables, at["slots"], size.context)

        def work() -> torch.Tensor:
            batch = Batch(token_ids, at["positions"], rows, None)
            hidden = self._decoder.hidden(batch, self._caches)
            if size.drawn is None:
                return hidden
            greedy, unfiltered = size.drawn
            parameters = {name: at[name] for name in sampler.COLUMNS}
            drawn = SamplingRows(**parameters, greedy=greedy, unfiltered=unfiltered)
            return ops.sample(self._decoder.logits(hidden), drawn)

        return ops.recorded(work)


def _form(rows: int, *, drawn: bool = False) -> Form:
    """What a recording of so many rows reads."""
    form = token_sections(rows) | {"lengths": Section(torch.int32, rows)}
    if drawn:
        form |= {name: Section(dtype, rows) for name, dtype in sampler.COLUMNS.items()}
    return form
