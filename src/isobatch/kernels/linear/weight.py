"""A weight matrix as the CPU kernels read it: panels of 32 outputs, k running down each panel.

Packed once at load. The packing is the only copy: the embedding of a tied model reads its rows from the same
panels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PANEL = 32


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """W of shape [N, K], stored as panels.

    Args:
        panels: float32 [ceil(N / 32), K, 32], CPU, contiguous; outputs beyond N are zero.
        outputs: N.
    """

    panels: torch.Tensor
    outputs: int

    @property
    def inputs(self) -> int:
        """K, the length of each sum."""
        return self.panels.shape[1]

    @classmethod
    def empty(cls, outputs: int, inputs: int) -> PackedWeight:
        """A weight of the right size, to be filled by `put`; zero until then."""
        return cls(torch.zeros(-(-outputs // PANEL), inputs, PANEL), outputs)

    @classmethod
    def pack(cls, weight: torch.Tensor) -> PackedWeight:
        """Packs a whole matrix.

        Args:
            weight: float32 [N, K], CPU, any strides.
        """
        packed = cls.empty(*weight.shape)
        packed.put(0, weight)
        return packed

    def put(self, start: int, rows: torch.Tensor) -> None:
        """Stores rows [start, start + len(rows)) of W.

        Args:
            start: the first output.
            rows: float32 [n, K], CPU, any strides.
        """
        stop = start + len(rows)
        first, last = -(-start // PANEL), stop // PANEL
        if first < last:
            whole = rows[first * PANEL - start : last * PANEL - start]
            self.panels[first:last] = whole.reshape(-1, PANEL, self.inputs).transpose(1, 2)
        # What is left over lies in a panel that other rows share.
        head = range(start, min(first * PANEL, stop))
        tail = range(max(last * PANEL, head.stop), stop)
        for output in (*head, *tail):
            self.panels[output // PANEL, :, output % PANEL] = rows[output - start]

    def unpack(self) -> torch.Tensor:
        """The matrix again, float32 [N, K], a copy."""
        return self.panels.transpose(1, 2).reshape(-1, self.inputs)[: self.outputs].contiguous()
