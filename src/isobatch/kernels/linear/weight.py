"""A weight matrix as the CPU kernels read it: panels of 32 outputs, k running down each panel, still coded.

Packed once at load. The packing is the only copy: the embedding of a tied model reads its rows from the same
panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from isobatch.errors import IntegrityError
from isobatch.kernels.coding import F32, CodedRows, Coding
from isobatch.kernels.cpu.tile import PANEL
from isobatch.kernels.cpu.widen import NIBBLES


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """W of shape [N, K], stored as panels.

    Args:
        coding: the form of its numbers.
        outputs: N.
        codes: bytes [ceil(N / 32), K, 32 * bits / 8]: for each k the codes of 32 outputs, in order; of 4-bit
            codes, two to a byte as NIBBLES says.
        scales: float32 [ceil(N / 32), K / group, 32]; no groups for a coding without scales.
        offsets: likewise.

    The arrays are NumPy's, since that is what kernels are called with; outputs beyond N are zero.
    """

    coding: Coding
    outputs: int
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.float32]

    @property
    def inputs(self) -> int:
        """K, the length of each sum."""
        return int(self.codes.shape[1])

    @classmethod
    def empty(cls, outputs: int, inputs: int, coding: Coding) -> PackedWeight:
        """A weight of the right size, to be filled by `put`; zero until then."""
        panels, groups = -(-outputs // PANEL), coding.groups(inputs)
        # From torch, whose memory begins at a cache line.
        codes = torch.zeros(panels, inputs, PANEL * coding.bits // 8, dtype=torch.uint8, device="cpu")
        scales = torch.zeros(panels, groups, PANEL, dtype=torch.float32, device="cpu")
        offsets = torch.zeros_like(scales if coding.has_offsets else scales[:, :0])
        return cls(coding, outputs, codes.numpy(), scales.numpy(), offsets.numpy())

    @classmethod
    def pack(cls, rows: CodedRows) -> PackedWeight:
        """Packs a whole matrix in its own coding."""
        packed = cls.empty(len(rows), rows.codes.shape[1], rows.coding)
        packed.put(0, rows)
        return packed

    def put(self, start: int, rows: CodedRows) -> None:
        """Stores rows [start, start + len(rows)) of W.

        Args:
            start: the first output.
            rows: [n, K], in this weight's coding; in any one if the weight is float32.

        Raises:
            IntegrityError: in another coding.
        """
        if self.coding == F32:
            rows = CodedRows.of(rows.floats())
        if rows.coding != self.coding:
            raise IntegrityError("rows in another coding", expected=self.coding, got=rows.coding)
        if self.coding.bits == 4:
            first, last = start // PANEL, -(-(start + len(rows)) // PANEL)
            spread = _unpacked(torch.from_numpy(self.codes[first:last]))
            _place(spread, start - first * PANEL, rows.codes)
            self.codes[first:last] = _packed(spread).numpy()
        else:
            _place(self._panels(), start, rows.codes)
        for panels, part in ((self.scales, rows.scales), (self.offsets, rows.offsets)):
            if part is not None:
                _place(torch.from_numpy(panels), start, part)

    def rows(self, outputs: torch.Tensor) -> CodedRows:
        """Some rows of W, copied.

        Args:
            outputs: int64 [n], each in [0, N).
        """
        panel, column = outputs // PANEL, outputs % PANEL

        def column_of(panels: npt.NDArray[np.float32]) -> torch.Tensor | None:
            return torch.from_numpy(panels)[panel, :, column] if panels.shape[1] else None

        if self.coding.bits == 4:
            at, shift = column % NIBBLES, column // NIBBLES * 4
            codes = (torch.from_numpy(self.codes)[panel, :, at] >> shift[:, None].to(torch.uint8)) & 15
        else:
            codes = self._panels()[panel, :, column]
        return CodedRows(self.coding, codes, column_of(self.scales), column_of(self.offsets))

    def _panels(self) -> torch.Tensor:
        """The codes [P, K, 32], where each has bytes of its own."""
        return torch.from_numpy(self.codes).view(self.coding.dtype)


class WidenedWeight:
    """Panels that are widened to float32 when they are filled: what the canonical member reads."""

    @staticmethod
    def empty(outputs: int, inputs: int, _coding: Coding) -> PackedWeight:
        """A float32 weight, whatever the coding of the rows that it will be given."""
        return PackedWeight.empty(outputs, inputs, F32)


@dataclass(frozen=True, slots=True, eq=False)
class PackedStack:
    """Matrices of experts, each packed by itself, so that no panel holds outputs of two."""

    weights: tuple[PackedWeight, ...]

    @classmethod
    def empty(cls, outputs: int, inputs: int, codings: Sequence[Coding]) -> PackedStack:
        """A matrix for each coding, to be filled by `PackedWeight.put`."""
        return cls(tuple(PackedWeight.empty(outputs, inputs, coding) for coding in codings))


class WidenedStack:
    """The same, widened to float32 when they are filled."""

    @staticmethod
    def empty(outputs: int, inputs: int, codings: Sequence[Coding]) -> PackedStack:
        """Float32 matrices, whatever the codings."""
        return PackedStack.empty(outputs, inputs, [F32] * len(codings))


def _place(panels: torch.Tensor, start: int, rows: torch.Tensor) -> None:
    """Puts rows [n, X] into columns `start` and following of panels [P, X, 32], counted through."""
    stop = start + len(rows)
    first, last = -(-start // PANEL), stop // PANEL
    if first < last:
        whole = rows[first * PANEL - start : last * PANEL - start]
        panels[first:last] = whole.reshape(-1, PANEL, panels.shape[1]).transpose(1, 2)
    # What is left over lies in a panel that other rows share.
    head = range(start, min(first * PANEL, stop))
    tail = range(max(last * PANEL, head.stop), stop)
    for output in (*head, *tail):
        panels[output // PANEL, :, output % PANEL] = rows[output - start]


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes [P, K, 32], two to a byte: [P, K, 16]."""
    low, high = codes.view(*codes.shape[:2], 2, NIBBLES).unbind(-2)
    return low | high << 4


def _unpacked(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `_packed`."""
    return torch.cat((codes & 15, codes >> 4), -1)
