"""Decode of long contexts at small batch: phases that fill the GPU, in the order of `triton.py`.

A sum that must run through the keys in order seems to forbid sharing one request's keys among programs. But a
maximum is exact in any order, so only the sums are a chain:
1. Scores: all blocks of keys at once. x_j of every key, and each block's maximum.
2. Weights: all blocks at once. From the maxima of the blocks before, a block's m and a, exactly as the chain
   would have them; then p_j, rounded to the storage dtype, and the block's four lane sums in float32.
3. Chain: acc = acc * a, then acc += p v, and the row sum. The columns of a head are independent of one
   another, so programs share out slices of columns; per block only the tensor core's steps are left.

On Hopper the second and third are one kernel, in `gluon_chain.py`. It runs beside the first, which counts the
blocks that are there, or takes its places as that one's programs end.

Keys are read once and values once. Grids depend on plain ints alone: programs step through the blocks with a
stride, as far as the length on the device says.

Shape letters: R requests, B blocks of 128 keys, H heads, Hkv key/value heads, G = H / Hkv, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.attention.launch import begin, exponent_scale, group_shape
from isobatch.kernels.attention.triton_steps import (
    COLUMNS,
    PAGE,
    SPAN,
    lane_sums_down,
    page_rows,
    pages_of,
    product,
    row_total,
)
from isobatch.kernels.gpu.device import gluon_runs, multiprocessors
from isobatch.kernels.gpu.overlap import early, inputs_ready, looked_up, next_may_begin, release
from isobatch.kernels.gpu.ptx import ex2, fma, mul, sub

_LEAST_PADDED = 4  # heads
# Programs of the scores that share a multiprocessor: with room for one block each, and for three.
_BRIEF, _DEEP = 6, 2
_SCORES, _ALONE = 3, 4  # blocks that a program has room for: of several, and of one, on a multiprocessor
_FEW = 4  # the chain runs beside the scores while so many times its programs would find a place at once
_CHAIN = 6  # blocks of its pipeline
RUN = 4  # blocks that are counted, and handed over, together


@triton.jit
def _context(query_starts, context_lengths, request, SETTLED: tl.constexpr = False):
    """Keys that a request's query sees: none without one, whatever its length, for there is no room."""
    end, begin = looked_up(query_starts + request + 1, SETTLED), looked_up(query_starts + request, SETTLED)
    return tl.where(end > begin, looked_up(context_lengths + request, SETTLED), 0)


@triton.jit(do_not_specialize=["blocks"])
def _scores_kernel(
    q, k, scores, maxima, counts, query_starts, context_lengths, block_tables, requests, c,
    q_row, q_head, table_row, blocks,
    block_stride: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    STAGES: tl.constexpr, RUN: tl.constexpr, READERS: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    """Axes: first block, key/value head, request. scores [R, Hkv, B, 128, G], maxima [R, Hkv, B, G].

    Where there are `counts` [R, Hkv, READERS, runs of blocks], a block is counted as soon as others may read
    it, for each of its readers. SETTLED: as in `PagedRows`.
    """
    if not SETTLED:
        inputs_ready()
        next_may_begin()
    group, item = tl.program_id(1), tl.program_id(2)
    request = item
    if requests is not None:
        request = looked_up(requests + item, SETTLED)
    context = _context(query_starts, context_lengths, request, SETTLED)
    first = tl.program_id(0)
    table = block_tables + request.to(tl.int64) * table_row
    # Without a key there is no page; what stands first in the table is one, or looked up in vain.
    pages = pages_of(table, first * SPAN, tl.maximum(context, 1), SETTLED)
    if SETTLED:
        inputs_ready()
        next_may_begin()
    if first * SPAN >= context:
        return
    row = tl.load(query_starts + request).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    inside = (d < D)[None, :]
    at = row * q_row + ((group * G + h) * q_head)[:, None] + d[None, :]
    qs = tl.load(q + at, mask=(h < G)[:, None] & inside, other=0.0)
    base = (item * tl.num_programs(1) + group).to(tl.int64) * blocks
    step = tl.num_programs(0)
    runs = tl.cdiv(blocks, RUN)
    counter = counts
    if counts is not None:
        counter += (item * tl.num_programs(1) + group) * READERS * runs
    for n in tl.range(first, tl.cdiv(context, SPAN), step, num_stages=STAGES):
        j = n * SPAN + tl.arange(0, SPAN)
        source = k + page_rows(pages, block_stride, group * (PAGE * D), D, 0, WIDTH)
        if WIDTH == D:
            kj = tl.load(source)
        else:
            kj = tl.load(source, mask=inside, other=0.0)
        pages = pages_of(table, (n + step) * SPAN, context)
        x = mul(product(kj, tl.trans(qs), None), tl.full((SPAN, HEADS), 0.0, tl.float32) + c)
        x = tl.where((j < context)[:, None], x, float("-inf"))
        if counts is not None:
            # The block before: its numbers have long been written, and so it costs no wait for them.
            before = tl.maximum(n - step, first)
            release(counter + before // RUN, runs * 4, READERS, (n > first).to(tl.int32))
        to = (base + n) * SPAN + tl.arange(0, SPAN)
        tl.store(scores + to[:, None] * G + h[None, :], x, mask=(h < G)[None, :])
        tl.store(maxima + (base + n) * G + h, tl.max(x, 0), mask=h < G)
    if counts is not None:
        last = first + (tl.cdiv(context, SPAN) - 1 - first) // step * step
        release(counter + last // RUN, runs * 4, READERS, 1)


@triton.jit(do_not_specialize=["blocks"])
def _weights_kernel(
    scores, maxima, weights, alphas, sums, query_starts, context_lengths, requests, blocks,
    G: tl.constexpr, HEADS: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Axes: block of keys, key/value head, request. weights [.., B, G, 128], alphas [.., B, HEADS],
    sums [.., B, HEADS, 4]; HEADS pads G for the compiler, not for the tensor core."""
    inputs_ready()
    next_may_begin()
    group, item = tl.program_id(1), tl.program_id(2)
    request = item
    if requests is not None:
        request = tl.load(requests + item)
    n = tl.program_id(0)
    if n * SPAN >= _context(query_starts, context_lengths, request):
        return
    h, lane, j = tl.arange(0, HEADS), tl.arange(0, 4), tl.arange(0, SPAN)
    mine = h < G
    base = (item * tl.num_programs(1) + group).to(tl.int64) * blocks
    m = tl.full((HEADS,), float("-inf"), tl.float32)
    for first in range(0, n, LOOK):
        i = first + tl.arange(0, LOOK)
        mask = (i < n)[:, None] & mine[None, :]
        tops = tl.load(maxima + (base + i[:, None]) * G + h[None, :], mask=mask, other=float("-inf"))
        m = tl.maximum(m, tl.max(tops, 0))
    x = tl.load(scores + ((base + n) * SPAN + j)[:, None] * G + h[None, :], mask=mine[None, :], other=0.0)
    top = tl.maximum(m, tl.load(maxima + (base + n) * G + h, mask=mine, other=0.0))
    p = ex2(sub(x, tl.broadcast_to(top[None, :], (SPAN, HEADS))))
    to = ((base + n) * G + h)[:, None] * SPAN + j[None, :]
    tl.store(weights + to, tl.trans(p.to(weights.dtype.element_ty)), mask=mine[:, None])
    at = (base + n) * HEADS + h
    tl.store(alphas + at, ex2(sub(m, top)))
    tl.store(sums + at[:, None] * 4 + lane[None, :], lane_sums_down(p, HEADS))


@triton.jit
def _chain_blocks(
    acc, lanes, weights, alphas, sums, v, table, begin, end, context, block_stride, base, group,
    G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr, SLICE: tl.constexpr,
    MASK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    h, lane, j = tl.arange(0, HEADS), tl.arange(0, 4), tl.arange(0, SPAN)
    column = tl.program_id(0) * SLICE
    pages = pages_of(table, begin, context)
    for start in tl.range(begin, end, SPAN, num_stages=STAGES):
        n = base + start // SPAN
        p = tl.load(weights + (n * G + h)[None, :] * SPAN + j[:, None], mask=(h < G)[None, :], other=0.0)
        alpha = tl.load(alphas + n * PADDED + h % PADDED)
        t = tl.load(sums + (n * PADDED + h % PADDED)[:, None] * 4 + lane[None, :])
        at = v + page_rows(pages, block_stride, group * (PAGE * D), D, column, SLICE)
        inside = (column + tl.arange(0, SLICE) < D)[None, :]
        if MASK:
            vj = tl.load(at, mask=(start + j < context)[:, None] & inside, other=0.0)
        elif D % SLICE == 0:
            vj = tl.load(at)
        else:
            vj = tl.load(at, mask=inside, other=0.0)
        pages = pages_of(table, start + SPAN, context)
        acc = product(tl.trans(vj), p, acc * alpha[None, :])
        lanes = fma(lanes, tl.broadcast_to(alpha[:, None], (HEADS, 4)), t)
    return acc, lanes


@triton.jit(do_not_specialize=["blocks"])
def _chain_kernel(
    weights, alphas, sums, v, out, query_starts, context_lengths, block_tables, requests,
    out_row, table_row, blocks,
    block_stride: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr,
    SLICE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Axes: slice of columns, key/value head, request. Columns run down: acc is [SLICE, HEADS]."""
    inputs_ready()
    next_may_begin()
    group, item = tl.program_id(1), tl.program_id(2)
    request = item
    if requests is not None:
        request = tl.load(requests + item)
    context = tl.load(context_lengths + request)
    row = tl.load(query_starts + request).to(tl.int64)
    if tl.load(query_starts + request + 1) <= row:
        return
    h = tl.arange(0, HEADS)
    d = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    table = block_tables + request.to(tl.int64) * table_row
    base = (item * tl.num_programs(1) + group).to(tl.int64) * blocks
    acc = tl.zeros((SLICE, HEADS), tl.float32)
    lanes = tl.zeros((HEADS, 4), tl.float32)
    if context > 0:
        whole = context // SPAN * SPAN
        acc, lanes = _chain_blocks(
            acc, lanes, weights, alphas, sums, v, table, 0, whole, context, block_stride, base, group,
            G, D, HEADS, PADDED, SLICE, False, STAGES,
        )  # fmt: skip
        acc, lanes = _chain_blocks(
            acc, lanes, weights, alphas, sums, v, table, whole, context, context, block_stride, base, group,
            G, D, HEADS, PADDED, SLICE, True, 1,
        )  # fmt: skip
    result = tl.where(context > 0, acc / row_total(lanes, HEADS)[None, :], 0.0)
    to = row * out_row + ((group * G + h) * D)[None, :] + d[:, None]
    tl.store(out + to, result.to(out.dtype.element_ty), mask=(h < G)[None, :] & (d < D)[:, None])


def attention_phases(
    q: torch.Tensor,
    cache: GpuKVCache,
    rows: GpuPagedRows,
    scale: float,
    *,
    fed: bool = True,
    chosen: tuple[int, ...] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode in three phases: requests with one query, of at most 16 heads per key/value head.

    Args: as of `attention_tiled`, but that each of the chosen requests has one query, that `rows.contexts`
        bounds the scratch memory, 4 bytes per head and key if fed and 6 if not, and
        fed: whether `gluon_chain.py` takes weights and chain where it runs.

    Returns:
        out; a request whose context length on the device is 0 gets zeros.

    Determinism:
        A row depends on its query and on its request's keys and values up to its position.
    """
    chosen, out = begin(q, rows, chosen, out)
    R, kv_heads = len(chosen), cache.k.shape[1]
    if not R:
        return out
    requests, tables = rows.requests(chosen), rows.block_tables
    shape = group_shape(q, cache)
    G, D = shape["G"], shape["D"]
    blocks = max(1, -(-max(rows.contexts[r] for r in chosen) // 128))
    groups, places, size = R * kv_heads, multiprocessors(), R * kv_heads * blocks
    fed = fed and gluon_runs() and D <= 128
    scores = torch.empty(size * 128 * G, dtype=torch.float32, device=q.device)
    maxima = torch.empty(size * G, dtype=torch.float32, device=q.device)
    slices = -(-D // COLUMNS.value)
    counts = _counts(rows, groups, slices, -(-blocks // RUN)) if fed else None
    if fed and groups * slices * _FEW <= places:
        # The chain runs at the same time; each program has one of the multiprocessors that it leaves.
        steps, stages = (places - groups * slices) // groups, _ALONE
    elif blocks * groups <= _BRIEF * places:
        # A block for each program while all find a place at once.
        steps, stages = blocks, 1
    else:
        steps, stages = max(1, _DEEP * places // groups), _SCORES
    _scores_kernel[(min(steps, blocks), kv_heads, R)](
        q, cache.k, scores, maxima, counts, rows.query_starts, rows.context_lengths, tables, requests,
        exponent_scale(scale), q.stride(0), q.stride(1), tables.stride(0), blocks,
        **shape, WIDTH=triton.next_power_of_2(D),
        STAGES=stages, RUN=RUN, READERS=slices, SETTLED=rows.settled, num_warps=4, num_stages=stages,
        **early(),
    )  # fmt: skip
    if counts is not None:
        from isobatch.kernels.attention.gluon_chain import chain

        chain(
            scores, maxima, counts, cache.v, out, rows.query_starts, rows.context_lengths, tables, requests,
            count=R, blocks=blocks,
        )  # fmt: skip
        return out
    padded = max(_LEAST_PADDED, triton.next_power_of_2(G))
    weights = torch.empty(size * G, 128, dtype=q.dtype, device=q.device)
    alphas, sums = torch.empty(5, size * padded, dtype=torch.float32, device=q.device).split((1, 4))
    _weights_kernel[(blocks, kv_heads, R)](
        scores, maxima, weights, alphas, sums, rows.query_starts, rows.context_lengths,
        requests, blocks, G=G, HEADS=padded, LOOK=128, num_warps=1, **early(),
    )  # fmt: skip
    _chain_kernel[(slices, kv_heads, R)](
        weights, alphas, sums, cache.v, out, rows.query_starts, rows.context_lengths, tables,
        requests, out.stride(0), tables.stride(0), blocks,
        **shape, PADDED=padded, SLICE=COLUMNS.value,
        STAGES=_CHAIN, num_warps=4, num_stages=_CHAIN, **early(),
    )  # fmt: skip
    return out


def _counts(rows: GpuPagedRows, groups: int, slices: int, runs: int) -> torch.Tensor:
    """Zeros. All layers have the same ones, for the chain leaves them so."""
    device = rows.query_starts.device
    return rows.once(
        ("counts", groups, slices, runs),
        lambda: torch.zeros(groups, slices, runs, dtype=torch.int32, device=device),
    )
