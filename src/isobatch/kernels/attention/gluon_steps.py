"""What the kernels in Gluon share: how a producer fetches a block out of its pages.

Triton's own pipeline asks for the next block's pages, waits for them and issues its copies between two
products, and so puts their latency into every step of a chain that may not be shortened. In Gluon a producer
warp does all that, several blocks ahead of the warps that sum.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from isobatch.kernels.attention.triton_steps import COLUMNS, PAGE, SPAN
from isobatch.kernels.gpu.overlap import looked_up

# Names that later releases have changed; where both are there, the older one only says so.
bulk_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
bulk_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def padded_heads(heads: int) -> int:
    """What heads of a group are padded to: the warp-group instruction's narrowest side, or a power of two."""
    return max(8, int(triton.next_power_of_2(heads)))


@cache
def layout(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of tiles whose rows are 64 numbers."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=dtype.itemsize * 8, rank=2)


def rows_of(tensor: torch.Tensor, rows: int, columns: int = COLUMNS.value) -> TensorDescriptor:
    """For the bulk copy engine: pieces [rows, columns] of a tensor [..., D] that begin at any row.

    Its rows lie at one distance from each other.

    What lies beyond the last column or row is read as zero.
    """
    flat = tensor.view(-1, tensor.shape[-1])
    return TensorDescriptor(
        flat, list(flat.shape), list(flat.stride()), [rows, columns], layout(tensor.dtype)
    )


@gluon.jit
def pair_of_pages(table, n, last, PAIR: gl.constexpr, SETTLED: gl.constexpr):
    """Two of block n's eight pages; beyond the last page, that one again."""
    i = n * 8 + PAIR * 2
    first = looked_up(table + gl.minimum(i, last), SETTLED)
    return first, looked_up(table + gl.minimum(i + 1, last), SETTLED)


@gluon.jit
def fetch_pair(source, block, ready, pages, kv_heads, group, column, PAIR: gl.constexpr):
    """Begins the copies of two pages' columns into their place in a block [128, 64]."""
    for i in gl.static_range(2):
        at = [(pages[i] * kv_heads + group) * PAGE, column]
        bulk_copy(source, at, ready, block.slice((PAIR * 2 + i) * PAGE, PAGE))


@gluon.jit
def clear_slots(values, filled):
    """Zeros the slots after the last key: they hold anything, and a weight of zero is no help against NaN."""
    row: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    j = gl.arange(0, SPAN, layout=gl.SliceLayout(1, row))
    bare = values.load(row)
    barrier()
    values.store(gl.where((j < filled)[:, None], bare, 0.0).to(bare.dtype))
    fence_async_shared()
    barrier()
