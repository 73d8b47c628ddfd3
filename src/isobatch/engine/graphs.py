"""Decode steps as CUDA graphs: a recording for each size of a ladder of batches, replayed with any contents.

A step of decode launches hundreds of kernels that take microseconds each; queued one by one, the host takes
longer than the device. Recorded, they are one launch. A recording reads its inputs where they lay when it was
made. So they lie in buffers that all recordings share, padded to the size of a rung: a padded row has context
length 0 and no slot, reads nothing, writes nothing, and is dropped before the output projection.

A draft is a row like any other, over its sequence's blocks and with a context one longer than that of the
row before it: in each layer all rows write their keys before any is read. Drafts lie behind all known tokens,
which so keep their rows, and their block tables, from step to step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import chain

import torch

from isobatch.engine.scheduled import Chunk, ScheduledStep
from isobatch.kernels.layout import Cache
from isobatch.models.decoder import Decoder
from isobatch.models.inputs import Batch
from isobatch.ops.queued import QueuedOps

_NOWHERE = -1
# Up to this many rows the choice of attention's member depends on the context: a recording for each doubling.
_FEW = 16
_SHORT = 256


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
    """

    def __init__(
        self, decoder: Decoder, ops: QueuedOps, caches: Sequence[Cache], max_rows: int, max_context: int
    ) -> None:
        self._decoder, self._ops, self._caches = decoder, ops, caches
        self._rungs = ladder(max_rows)
        self._max_context = max_context
        most = self._rungs[-1]
        # Token ids, positions, slots.
        self._ints = ops.tensor([[0] * most, [0] * most, [_NOWHERE] * most])
        self._lengths = ops.tensor([0] * most, torch.int32)
        pages = -(-max_context // ops.page)
        self._tables = torch.zeros(most, pages, dtype=torch.int32, device=ops.device)
        self._shown: list[tuple[int, ...]] = [()] * most
        self._recorded: dict[tuple[int, int], tuple[Callable[[], object], torch.Tensor]] = {}

    def fits(self, step: ScheduledStep) -> bool:
        """Whether the step is all decode: one token of each sequence, whose logits are wanted, and drafts."""
        return sum(1 + len(chunk.drafts) for chunk in step.chunks) <= self._rungs[-1] and all(
            chunk.samples and len(chunk.token_ids) == 1 and chunk.start >= len(chunk.sequence.prompt_ids)
            for chunk in step.chunks
        )

    def run(self, step: ScheduledStep, patch: Callable[[torch.Tensor], object] | None) -> torch.Tensor:
        """Queues a step that fits.

        Args:
            step: the plan.
            patch: writes pending tokens into the token ids, or None.

        Returns:
            Logits, float32 [R, V], a sequence's drafts behind its token. Their projection is not recorded:
            each recording would keep its own, and those of a thousand rows take hundreds of megabytes.
        """
        return self.ready(step, patch)()

    def ready(
        self, step: ScheduledStep, patch: Callable[[torch.Tensor], object] | None
    ) -> Callable[[], torch.Tensor]:
        """Brings what a step that fits reads to where its recording looks for it.

        Args:
            step: the plan.
            patch: as of `run`.

        Returns:
            What queues the step, and gives its logits; again and again, until another step is made ready.
        """
        ops, chunks, page = self._ops, step.chunks, self._ops.page
        # Of each draft the chunk; of each row the chunk's table, and the position.
        owners = [at for at, chunk in enumerate(chunks) for _ in chunk.drafts]
        rows = [(chunk.block_table, chunk.start) for chunk in chunks]
        rows += [(c.block_table, p) for c in chunks if c.drafts for p in range(c.stop, c.end)]
        size = self._rungs[bisect_left(self._rungs, len(rows))]
        spare = size - len(rows)
        positions = [position for _, position in rows]
        slots = [table[position // page] * page + position % page for table, position in rows]
        tokens = [max(0, chunk.token_ids[0]) for chunk in chunks]
        tokens += chain.from_iterable(chunk.drafts for chunk in chunks)
        ints = [[*tokens, *[0] * spare], [*positions, *[0] * spare], [*slots, *[_NOWHERE] * spare]]
        self._ints[:, :size].copy_(ops.tensor(ints))
        self._lengths[:size].copy_(ops.tensor([*(p + 1 for p in positions), *[0] * spare], torch.int32))
        self._show([chunk.block_table for chunk in chunks])
        self._show_again(owners, len(chunks))
        if patch is not None:
            patch(self._ints[0])
        key = size, self._bound(size, max(positions) + 1)
        if key not in self._recorded:
            self._record(*key)
        replay, hidden = self._recorded[key]
        order = self._order(chunks) if owners else slice(len(rows))

        def queue() -> torch.Tensor:
            replay()
            return self._decoder.logits(hidden[order])

        return queue

    def _order(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The rows, each sequence's drafts behind its token."""
        order, behind = [], len(chunks)
        for row, chunk in enumerate(chunks):
            order += [row, *range(behind, behind + len(chunk.drafts))]
            behind += len(chunk.drafts)
        return self._ops.tensor(order)

    def _bound(self, size: int, context: int) -> int:
        """The context that a recording is made for, which covers this one."""
        if context <= _SHORT:
            return min(_SHORT, self._max_context)
        return min(1 << (context - 1).bit_length(), self._max_context) if size <= _FEW else self._max_context

    def _show(self, tables: list[tuple[int, ...]]) -> None:
        """Brings the block tables on the device up to date: most steps add a block to few rows."""
        width, places, blocks = self._tables.shape[1], [], []
        changed = [row for row, table in enumerate(tables) if self._shown[row] != table]
        for row in changed:
            shown, table = self._shown[row], tables[row]
            same = len(shown) if table[: len(shown)] == shown else 0
            places.append(range(row * width + same, row * width + len(table)))
            blocks.append(table[same:])
            # An exception may come before the write is queued: until then nothing counts as shown.
            self._shown[row] = ()
        if changed:
            at, values = self._ops.tensor([[*chain.from_iterable(places)], [*chain.from_iterable(blocks)]])
            self._tables.view(-1).index_copy_(0, at, values.int())
        for row in changed:
            self._shown[row] = tables[row]

    def _show_again(self, rows: list[int], start: int) -> None:
        """Copies the tables of rows, which are up to date, to the rows from `start` on."""
        if rows:
            shown = slice(start, start + len(rows))
            self._shown[shown] = [()] * len(rows)
            self._tables[shown] = self._tables[self._ops.tensor(rows)]
            self._shown[shown] = [self._shown[row] for row in rows]

    def _record(self, size: int, context: int) -> None:
        """Records a step of `size` rows, whose contexts are at most `context`."""
        ops = self._ops
        token_ids, positions, slots = self._ints[:, :size]
        everyone = ops.tensor(list(range(size)))
        rows = ops.decode_rows(self._lengths[:size], self._tables[:size], slots, context)
        batch = Batch(token_ids, positions, rows, everyone)
        # The run that goes before the recording is of padded rows alone: no key is written twice.
        lengths, places = self._lengths[:size].clone(), slots.clone()
        self._lengths[:size].zero_()
        slots.fill_(_NOWHERE)
        self._recorded[size, context] = ops.recorded(lambda: self._decoder.hidden(batch, self._caches))
        self._lengths[:size].copy_(lengths)
        slots.copy_(places)
