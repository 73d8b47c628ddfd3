"""Small steps with chunks in them as CUDA graphs: a prompt, or the rest of one, among sequences that decode.

A step of a few hundred tokens takes the device less than it takes the host to queue it, so that every prompt
that arrives would hold up all who decode. It is recorded like a step of decode (`engine/graphs.py`), for
sizes further apart: so many tokens, so many tiles of attention's. How the tokens are shared out among
sequences, and how many of those decode, is read from the device, so that one recording serves any mixture.
Long steps are queued as ever: there the device has more to do than the host.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch

from isobatch.engine.batch import packed
from isobatch.engine.block_tables import BlockTables
from isobatch.engine.graph_inputs import KNOWN, PLACES, TOKENS, Form, GraphInputs, Section, token_sections
from isobatch.engine.graphs import Computed, Pending, Recording, recording
from isobatch.engine.scheduled import ScheduledStep
from isobatch.kernels.layout import Cache, TiledRows
from isobatch.models.decoder import Decoder
from isobatch.models.inputs import Batch
from isobatch.ops.queued import QueuedOps, Tiling

_RUNGS = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
_LEAST = 16  # tiles

_Size = tuple[int, int, bool]
"""Tokens and tiles, padded ones included, and whether there are singles."""


class ChunkGraphs:
    """The recordings. A size is recorded when it comes for the second time: many come once.

    Args:
        decoder: the model.
        ops: its own.
        tiling: of these ops.
        caches: one per layer.
        tables: the block tables, shared with the recordings of decode.
    """

    def __init__(
        self,
        decoder: Decoder,
        ops: QueuedOps,
        tiling: Tiling,
        caches: Sequence[Cache],
        tables: BlockTables,
    ) -> None:
        self._decoder, self._ops, self._caches, self._tables = decoder, ops, caches, tables
        self._tiling = tiling
        # Sequences, singles and tiles have a query of their own each. Only where a group has more heads than
        # a tile has rows there may be more tiles, and then a step is not recorded.
        self._inputs = GraphInputs(ops, [_form((_RUNGS[-1], _RUNGS[-1], True))])
        self._seen: set[_Size] = set()
        self._recorded: dict[_Size, Recording | None] = {}

    def run(self, step: ScheduledStep, pending: Pending | None = None) -> Computed | None:
        """Queues a step, if it is small enough, its size has come before, and there is memory to record it.

        Args:
            step: the plan.
            pending: tokens of it that are not known here yet.

        Returns:
            The logits of its rows, which last until the next step is queued; None if nothing was queued.
        """
        queries = [chunk.end - chunk.start for chunk in step.chunks]
        if sum(queries) > _RUNGS[-1]:
            return None
        requests, firsts, singles = self._tiling.cut(queries, [chunk.end for chunk in step.chunks])
        rows, tiles = _RUNGS[bisect_left(_RUNGS, sum(queries))], _padded(len(requests))
        if tiles > _RUNGS[-1]:
            return None
        size = rows, tiles, bool(singles)
        if size not in self._seen:
            self._seen.add(size)
            return None
        if size not in self._recorded:
            self._recorded[size] = recording(lambda: self._record(size))
        if (recorded := self._recorded[size]) is None:
            return None
        replay, hidden = recorded
        found = packed(step, self._ops.page)
        places = {} if pending is None else pending.places
        last = {found.starts[at + 1] - 1: place for at, place in places.items()}
        spare = [rows] * (tiles - len(requests))
        self._inputs.send(
            _form(size),
            {
                TOKENS: found.token_ids,
                PLACES: [last.get(at, KNOWN) for at in range(len(found.token_ids))],
                "positions": found.positions,
                "slots": found.slots,
                "starts": found.starts,
                "lengths": found.lengths,
                "tiles": [*requests, *spare, *firsts, *[0] * len(spare)],
                "singles": singles,
                "single_count": [len(singles)],
                "wanted": found.logit_rows,
            },
        )
        self._tables.show([chunk.block_table for chunk in step.chunks])
        self._inputs.fill_in(_form(size), None if pending is None else pending.sampled)
        replay()
        wanted = self._inputs.views(_form(size))["wanted"][: len(found.logit_rows)]
        return Computed(logits=self._decoder.logits(hidden[wanted]))

    def _record(self, size: _Size) -> Recording:
        rows, tiles, _ = size
        # The run that goes before the recording is of padded rows alone: it writes nothing.
        self._inputs.send(_form(size), {"tiles": [rows] * tiles})
        at, token_ids = self._inputs.views(_form(size)), self._inputs.token_ids(_form(size))
        tiled = at["tiles"].view(2, tiles), at["singles"], at["single_count"]
        paged = TiledRows(at["starts"], at["lengths"], self._tables.tensor, at["slots"], *tiled, settled=True)

        def work() -> torch.Tensor:
            batch = Batch(token_ids, at["positions"], paged, None)
            return self._decoder.hidden(batch, self._caches)

        return self._ops.recorded(work)


def _padded(count: int) -> int:
    return max(_LEAST, 1 << (count - 1).bit_length())


def _form(size: _Size) -> Form:
    """What a recording of this size reads: chunk `rows` is of a sequence that is not there."""
    rows, tiles, singles = size
    return token_sections(rows) | {
        "wanted": Section(torch.int64, rows),
        "starts": Section(torch.int32, rows + 2),
        "lengths": Section(torch.int32, rows + 1),
        "tiles": Section(torch.int32, 2 * tiles),
        "singles": Section(torch.int32, rows if singles else 0),
        "single_count": Section(torch.int32, 1),
    }
