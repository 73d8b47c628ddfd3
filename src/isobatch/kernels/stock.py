"""The other side of every comparison: torch's own kernels, laid out as servers lay them out.

Nothing here is certified and nothing here carries a fingerprint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from isobatch.kernels.coding import CodedRows, Coding
from isobatch.kernels.layout import PAGE, Layout


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A weight as torch wants it: float32 [N, K], contiguous, whatever the coding of its rows."""

    dense: torch.Tensor

    @property
    def outputs(self) -> int:
        """N."""
        return self.dense.shape[0]

    @property
    def inputs(self) -> int:
        """K."""
        return self.dense.shape[1]

    @classmethod
    def empty(cls, outputs: int, inputs: int, _coding: Coding) -> DenseWeight:
        """Uninitialised, to be filled by `put`."""
        return cls(torch.empty(outputs, inputs, dtype=torch.float32, device="cpu"))

    def put(self, start: int, rows: CodedRows) -> None:
        """Stores rows [start, start + len(rows)), rounded to this weight's dtype where it is narrower."""
        self.dense[start : start + len(rows)] = rows.numbers()


@dataclass(frozen=True, slots=True)
class DenseStack:
    """Matrices of experts side by side: [E, N, K], contiguous."""

    dense: torch.Tensor

    @property
    def weights(self) -> list[DenseWeight]:
        """Views of each."""
        return [DenseWeight(matrix) for matrix in self.dense]

    @classmethod
    def empty(cls, outputs: int, inputs: int, codings: Sequence[Coding]) -> DenseStack:
        """Uninitialised, float32."""
        return cls(torch.empty(len(codings), outputs, inputs, dtype=torch.float32, device="cpu"))


@dataclass(frozen=True, slots=True)
class DenseCache:
    """Keys and values of one layer: [blocks, page, Hkv, D] each."""

    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def empty(cls, blocks: int, kv_heads: int, head_size: int) -> DenseCache:
        """Zeros, float32, because a mask turns a weight into zero but leaves NaN alone."""
        shape = (blocks, PAGE, kv_heads, head_size)
        return cls(*(torch.zeros(shape, dtype=torch.float32, device="cpu") for _ in "kv"))


GPU_PAGE = 64
"""Tokens in a KV block of torch's kernels on a GPU: the tile of keys of FlexAttention's decoding kernel."""
STOCK = Layout(weight=DenseWeight, cache=DenseCache, stack=DenseStack)
