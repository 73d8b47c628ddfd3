"""The layouts that GPU kernels share, in a storage dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from isobatch.errors import UnsupportedOpError
from isobatch.kernels.attention.gpu_rows import GpuKVCache
from isobatch.kernels.coding import Coding
from isobatch.kernels.gpu.device import device
from isobatch.kernels.gpu.paired import TURN, PairedWeight
from isobatch.kernels.layout import Layout, Weight
from isobatch.kernels.moe.triton import WIDTH_MULTIPLE
from isobatch.kernels.stock import GPU_PAGE, DenseCache, DenseStack, DenseWeight


@dataclass(frozen=True, slots=True)
class _Weights:
    dtype: torch.dtype

    def empty(self, outputs: int, inputs: int, _coding: Coding) -> DenseWeight:
        """[N, K] on the device: the numbers of rows are rounded to the dtype, once."""
        return DenseWeight(torch.empty(outputs, inputs, dtype=self.dtype, device=device()))


@dataclass(frozen=True, slots=True)
class _Pairs:
    dtype: torch.dtype

    def empty(self, outputs: int, inputs: int, coding: Coding) -> Weight:
        """Gates and ups in turns; above each other where their number has no turns."""
        weight = _Weights(self.dtype).empty(outputs, inputs, coding)
        return weight if outputs % (2 * TURN) else PairedWeight(weight)


@dataclass(frozen=True, slots=True)
class _Stacks:
    dtype: torch.dtype

    def empty(self, outputs: int, inputs: int, codings: Sequence[Coding]) -> DenseStack:
        """[E, N, K] on the device.

        Raises:
            UnsupportedOpError: K is not what the grouped products take.
        """
        if inputs % WIDTH_MULTIPLE:
            raise UnsupportedOpError(
                "no certified kernel for experts of this width",
                expected=f"a multiple of {WIDTH_MULTIPLE}",
                got=inputs,
                fix='use device="cpu"',
            )
        return DenseStack(torch.empty(len(codings), outputs, inputs, dtype=self.dtype, device=device()))


@dataclass(frozen=True, slots=True)
class _Caches:
    dtype: torch.dtype

    def empty(self, blocks: int, kv_heads: int, head_size: int) -> GpuKVCache:
        """Uninitialised."""
        return GpuKVCache.empty(blocks, kv_heads, head_size, self.dtype)


@dataclass(frozen=True, slots=True)
class _StockCaches:
    dtype: torch.dtype

    def empty(self, blocks: int, kv_heads: int, head_size: int) -> DenseCache:
        """Zeros, because a mask leaves NaN alone; and a page that nobody reads, for rows with slot -1."""
        shape = (blocks + 1, GPU_PAGE, kv_heads, head_size)
        return DenseCache(*(torch.zeros(shape, dtype=self.dtype, device=device()) for _ in "kv"))


def gpu_layout(dtype: torch.dtype) -> Layout:
    """Weights [N, K], experts' [E, N, K] and paged caches on the device, in bfloat16 or float16."""
    return Layout(_Weights(dtype), _Caches(dtype), _Stacks(dtype), gate_up=_Pairs(dtype))


def stock_layout(dtype: torch.dtype) -> Layout:
    """The same weights, gates above ups, and caches as torch's attention wants them."""
    return replace(gpu_layout(dtype), cache=_StockCaches(dtype), page=GPU_PAGE, gate_up=None)
