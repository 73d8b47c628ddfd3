"""Block tables as recordings read them: on the device, and written only where they have changed."""

from __future__ import annotations

from itertools import chain

import torch

from isobatch.ops.queued import QueuedOps


class BlockTables:
    """Rows of block numbers on the device. Most steps add a block to few of them.

    Args:
        ops: on whose device.
        rows: how many.
        width: the most blocks of a row.

    Attributes:
        tensor: int32 [rows, width]; what lies behind a row's own blocks is anything.
    """

    def __init__(self, ops: QueuedOps, rows: int, width: int) -> None:
        self._ops = ops
        self.tensor = torch.zeros(rows, width, dtype=torch.int32, device=ops.device)
        self._shown: list[tuple[int, ...]] = [()] * rows

    def show(self, tables: list[tuple[int, ...]]) -> None:
        """Queues what brings the first rows up to date."""
        width, places, blocks = self.tensor.shape[1], [], []
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
            self.tensor.view(-1).index_copy_(0, at, values.int())
        for row in changed:
            self._shown[row] = tables[row]

    def repeat(self, rows: list[int], start: int) -> None:
        """Queues a copy of rows, which are up to date, to the rows from `start` on."""
        if rows:
            shown = slice(start, start + len(rows))
            self._shown[shown] = [()] * len(rows)
            self.tensor[shown] = self.tensor[self._ops.tensor(rows)]
            self._shown[shown] = [self._shown[row] for row in rows]
