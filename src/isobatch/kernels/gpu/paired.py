"""Gates and ups of an MLP in one matrix, in turns of eight rows.

Of sixteen outputs `wgmma` leaves o and o + 8 to the same thread, whichever operand is on the left. So the
tile that has both can store silu(gate) * up without asking another thread, and is no other tile than for any
matrix. An output is a sum of its own wherever its row lies: no bit knows of the turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from isobatch.kernels.coding import CodedRows
from isobatch.kernels.stock import DenseWeight

TURN = 8
"""Rows of gates, and then of ups."""


@dataclass(frozen=True, slots=True)
class PairedWeight:
    """W [2 I, K], filled as if gates lay above ups.

    Args:
        turns: the matrix as it lies: eight gates, their eight ups, the next eight gates, and so on.
    """

    turns: DenseWeight

    @property
    def outputs(self) -> int:
        """2 I."""
        return self.turns.outputs

    @property
    def inputs(self) -> int:
        """K."""
        return self.turns.inputs

    @classmethod
    def of(cls, gates_above_ups: torch.Tensor) -> PairedWeight:
        """A matrix [2 I, K] whose rows take turns; I is a multiple of eight."""
        made = cls(DenseWeight(torch.empty_like(gates_above_ups, memory_format=torch.contiguous_format)))
        made.put(0, CodedRows.of(gates_above_ups))
        return made

    def put(self, start: int, rows: CodedRows) -> None:
        """Stores rows [start, start + len(rows)), counted with gates above ups, rounded to this dtype."""
        dense, inner = self.turns.dense, self.outputs // 2
        row = torch.arange(start, start + len(rows), device=dense.device)
        of_its_kind = row % inner
        at = of_its_kind // TURN * 2 * TURN + row // inner * TURN + of_its_kind % TURN
        dense.index_copy_(0, at, rows.numbers().to(dense.device, dense.dtype))

    def apart(self) -> DenseWeight:
        """A copy with gates above ups."""
        dense = self.turns.dense
        turns = dense.view(-1, 2, TURN, dense.shape[1]).transpose(0, 1)
        return DenseWeight(turns.reshape(dense.shape))
