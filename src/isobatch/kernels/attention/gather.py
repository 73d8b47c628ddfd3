"""Copies chunks' keys and values out of their pages into one piece each, for members that want them so.

A page is no box of the bulk copy engine's, and the library knows no pages. A copy costs memory traffic of the
order of the context, the attention of a chunk the context times the chunk: from some chunk length on it pays.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.layout import PAGE

PAGE_TOKENS = tl.constexpr(PAGE)


@triton.jit(do_not_specialize=["room"])
def _gather_kernel(
    k, v, key, value, requests, origins, context_lengths, block_tables, table_row, block_stride, head_stride,
    room, PIECE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Axes: page, key/value head, request. A page of one head is PIECE numbers in a row, here and there."""
    request = tl.program_id(2)
    if requests is not None:
        request = tl.load(requests + request)
    page, head = tl.program_id(0), tl.program_id(1)
    context = tl.load(context_lengths + request)
    left = context - page * PAGE_TOKENS
    if left <= 0 and page >= room:
        return
    i = tl.arange(0, WIDTH)
    used = i < tl.minimum(left, PAGE_TOKENS) * (PIECE // PAGE_TOKENS)
    last = tl.maximum(context - 1, 0) // PAGE_TOKENS
    block = tl.load(block_tables + request.to(tl.int64) * table_row + tl.minimum(page, last)).to(tl.int64)
    source = block * block_stride + head * PIECE + i
    origin = tl.load(origins + request).to(tl.int64) * (PIECE // PAGE_TOKENS)
    to = head.to(tl.int64) * head_stride + origin + page * PIECE + i
    tl.store(key + to, tl.load(k + source, mask=used, other=0.0), mask=i < PIECE)
    tl.store(value + to, tl.load(v + source, mask=used, other=0.0), mask=i < PIECE)


def places(
    rows: GpuPagedRows, chosen: tuple[int, ...], length: int | None = None
) -> tuple[list[int], int, int]:
    """Where `gather` puts requests: (the row of each one's position 0, rows in all, pages of the longest)."""

    def lay() -> tuple[list[int], int, int]:
        firsts, total, longest = [0] * len(rows.queries), 0, 0
        for r in chosen:
            firsts[r] = total
            pages = -(-(length or rows.contexts[r]) // PAGE)
            total, longest = total + pages * PAGE, max(longest, pages)
        return firsts, total, longest

    return rows.once(("places", chosen, length), lay)


def gather(
    cache: GpuKVCache, rows: GpuPagedRows, chosen: tuple[int, ...], length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of some requests, each request's in one piece. A copy.

    Args:
        cache: of the layer.
        rows: whose `contexts` are exact for the chosen requests.
        chosen: the requests.
        length: positions that each request has room for, whole pages; by default its own pages. Beyond a
            request's last key there are zeros.

    Returns:
        (keys, values, origins): [N, Hkv, D] each, a view whose heads lie one after another; the row with each
        chosen request's position 0, int32 [R] on the device.
    """
    _, kv_heads, _, D = cache.k.shape
    firsts, total, longest = places(rows, chosen, length)
    origins = rows.once(("origins", chosen, length), lambda: rows.upload(firsts))
    pieces = torch.empty(2, kv_heads, total, D, dtype=cache.k.dtype, device=cache.k.device)
    _gather_kernel[(longest, kv_heads, len(chosen))](
        cache.k, cache.v, pieces[0], pieces[1], rows.requests(chosen), origins, rows.context_lengths,
        rows.block_tables, rows.block_tables.stride(0), cache.k.stride(0), total * D, (length or 0) // PAGE,
        PIECE=PAGE * D, WIDTH=triton.next_power_of_2(PAGE * D), num_warps=4,
    )  # fmt: skip
    return pieces[0].transpose(0, 1), pieces[1].transpose(0, 1), origins
