"""Decode of one query per request with keys running down the tile, in the order of `triton.py`.

The heads of a group are few, the keys of a block many: with the products turned round (k q^T and v^T p^T) the
tensor core's tall side holds keys, then columns, and nothing is padded from 4 heads to 16 rows. On Hopper
both products then are warp-group instructions that read keys and values straight from shared memory.

Shape letters: R requests, H heads, Hkv key/value heads, G = H / Hkv, HEADS = G padded, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.attention.launch import begin, exponent_scale, group_shape
from isobatch.kernels.attention.triton_steps import (
    PAGE,
    SPAN,
    first_pages,
    lane_sums_down,
    page_rows,
    pages_of,
    product,
    row_total,
)
from isobatch.kernels.gpu.overlap import early, inputs_ready, looked_up, next_may_begin
from isobatch.kernels.gpu.ptx import ex2, fma, mul, sub
from isobatch.kernels.layout import PagedRows


@triton.jit
def _decode_blocks(
    acc, m, lanes, q, k, v, table, pages, group, context, block_stride, c,
    D: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    inside = (tl.arange(0, WIDTH) < D)[None, :]
    for start in tl.range(0, context, SPAN, num_stages=STAGES):
        seen = (start + tl.arange(0, SPAN) < context)[:, None]
        at = page_rows(pages, block_stride, group * (PAGE * D), D, 0, WIDTH)
        pages = pages_of(table, start + SPAN, context)
        if WIDTH == D:
            kj = tl.load(k + at)
        else:
            kj = tl.load(k + at, mask=inside, other=0.0)
        x = mul(product(kj, tl.trans(q), None), tl.full((SPAN, HEADS), 0.0, tl.float32) + c)
        x = tl.where(seen, x, float("-inf"))
        top = tl.maximum(m, tl.max(x, 0))
        p = ex2(sub(x, tl.broadcast_to(top[None, :], (SPAN, HEADS))))
        alpha = ex2(sub(m, top))
        m = top
        vj = tl.load(v + at, mask=seen & inside, other=0.0)
        acc = product(tl.trans(vj), p.to(v.dtype.element_ty), acc * alpha[None, :])
        lanes = fma(lanes, tl.broadcast_to(alpha[:, None], (HEADS, 4)), lane_sums_down(p, HEADS))
    return acc, m, lanes


@triton.jit
def _decode_kernel(
    q, k, v, out, query_starts, context_lengths, block_tables, requests, counted, c,
    q_row, q_head, out_row, table_row,
    block_stride: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    STAGES: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    """Axes: key/value head, request.

    Where there is `counted`, int32 [1], it says how many requests there are. SETTLED: as in `PagedRows`.
    """
    if not SETTLED:
        inputs_ready()
    group, item = tl.program_id(0), tl.program_id(1)
    request = item
    if requests is not None:
        request = looked_up(requests + item, SETTLED)
    # A short context is a chain of loads that wait for one another: as few as can be, and no branch between.
    context = looked_up(context_lengths + request, SETTLED)
    row = looked_up(query_starts + request, SETTLED).to(tl.int64)
    heads = tl.where(looked_up(query_starts + request + 1, SETTLED) > row, G, 0)
    if counted is not None:
        there = item < looked_up(counted, SETTLED)
        context, heads = tl.where(there, context, 0), tl.where(there, heads, 0)
    table = block_tables + request.to(tl.int64) * table_row
    pages = first_pages(table, table_row, context, SETTLED)
    if SETTLED:
        inputs_ready()
    h, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    at = row * q_row + ((group * G + h) * q_head)[:, None] + d[None, :]
    qs = tl.load(q + at, mask=(h < heads)[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros((WIDTH, HEADS), tl.float32)
    m = tl.full((HEADS,), float("-inf"), tl.float32)
    lanes = tl.zeros((HEADS, 4), tl.float32)
    if context > 0:
        # One loop, so that the last block's keys are on their way while the ones before are worked on.
        acc, m, lanes = _decode_blocks(
            acc, m, lanes, qs, k, v, table, pages, group, context, block_stride, c, D, WIDTH, HEADS, STAGES
        )
    next_may_begin()
    result = tl.where(context > 0, acc / row_total(lanes, HEADS)[None, :], 0.0)
    to = row * out_row + ((group * G + h) * D)[None, :] + d[:, None]
    tl.store(out + to, result.to(out.dtype.element_ty), mask=(h < heads)[None, :] & (d < D)[:, None])


@dataclass(frozen=True, slots=True)
class Down:
    """A member's free choices: warps, and stages of the pipeline."""

    warps: int = 4
    stages: int = 3


def attention_down(
    q: torch.Tensor,
    cache: GpuKVCache,
    rows: GpuPagedRows,
    scale: float,
    *,
    down: Down,
    chosen: tuple[int, ...] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode: one program per request and key/value head.

    Args: as of `attention_tiled`, but that each of the chosen requests has one query, and
        down: the member.

    Returns:
        out; a request whose context length on the device is 0 gets zeros.

    Determinism:
        A row depends on its query and on its request's keys and values up to its position.
    """
    chosen, out = begin(q, rows, chosen, out)
    if chosen:
        down_of(q, cache, rows, scale, rows.requests(chosen), len(chosen), down=down, out=out)
    return out


def down_of(
    q: torch.Tensor,
    cache: GpuKVCache,
    rows: PagedRows,
    scale: float,
    requests: torch.Tensor | None,
    count: int,
    counted: torch.Tensor | None = None,
    *,
    down: Down,
    out: torch.Tensor,
) -> None:
    """The same of requests that are known on the device, as of `streamed_of` in `gluon_decode.py`."""
    _decode_kernel[(cache.k.shape[1], count)](
        q, cache.k, cache.v, out, rows.query_starts, rows.context_lengths, rows.block_tables, requests,
        counted, exponent_scale(scale), q.stride(0), q.stride(1), out.stride(0), rows.block_tables.stride(0),
        **group_shape(q, cache), WIDTH=triton.next_power_of_2(q.shape[2]),
        STAGES=down.stages, SETTLED=rows.settled, num_warps=down.warps, num_stages=down.stages, **early(),
    )  # fmt: skip
