"""Keys and values into the pages of a cache.

Shape letters: T rows, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.attention.gpu_rows import GpuKVCache
from isobatch.kernels.attention.triton_steps import PAGE
from isobatch.kernels.layout import PagedRows


@triton.jit
def _write_kv_kernel(
    key, value, slots, k, v, key_row, key_head, value_row, value_head, block_stride,
    HEADS: tl.constexpr, H_WIDTH: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t).to(tl.int64)
    if slot < 0:
        return
    h = tl.arange(0, H_WIDTH)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    inside = (h < HEADS) & (d < D)
    to = slot // PAGE * block_stride + (h * PAGE + slot % PAGE) * D + d
    tl.store(k + to, tl.load(key + t * key_row + h * key_head + d, mask=inside), mask=inside)
    tl.store(v + to, tl.load(value + t * value_row + h * value_head + d, mask=inside), mask=inside)


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: GpuKVCache, rows: PagedRows) -> None:
    """Stores each row's key and value in its slot. A copy, no arithmetic.

    Args:
        key: bf16 or fp16 [T, Hkv, D], on the device, D contiguous.
        value: likewise.
        cache: of the layer.
        rows: `slots` says where each row goes; a padded row's slot is negative.
    """
    T, kv_heads, D = key.shape
    if T:
        _write_kv_kernel[(T,)](
            key, value, rows.slots, cache.k, cache.v, key.stride(0), key.stride(1), value.stride(0),
            value.stride(1), cache.k.stride(0), HEADS=kv_heads, H_WIDTH=triton.next_power_of_2(kv_heads), D=D,
            WIDTH=triton.next_power_of_2(D), num_warps=2,
        )  # fmt: skip
