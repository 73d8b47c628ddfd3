"""Decode of one query per request on Hopper: two producer warps, four that sum; the order of `triton.py`.

As `triton_decode.py` has it, keys run down the tile. What is new is who waits for what. Keys and values come
in rings that the bulk copy engine fills, so that a program has many blocks on their way and 64 programs draw
all of the memory's bandwidth; and the next block's scores are begun before this block's weights are taken.

Triton's interpreter does not know Gluon: `triton_decode.py` serves on the CPU. Tests run this text, too.

Shape letters: R requests, H heads, Hkv key/value heads, G = H / Hkv, HEADS = G padded, D head size, PARTS of
64 columns that a head is cut into.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from isobatch.kernels.attention.gluon_decode_feed import blocks_of, context_of, produce
from isobatch.kernels.attention.gluon_steps import (
    barrier,
    clear_slots,
    layout,
    padded_heads,
    rows_of,
)
from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.attention.launch import begin, exponent_scale
from isobatch.kernels.attention.triton_steps import COLUMNS, SPAN, lane_sums_down, row_total
from isobatch.kernels.gpu.device import multiprocessors
from isobatch.kernels.gpu.overlap import early, looked_up
from isobatch.kernels.gpu.ptx import ex2, fma, mul, sub
from isobatch.kernels.layout import PagedRows


@gluon.jit
def _scores(keys, s, queries, PARTS: gl.constexpr, HEADS: gl.constexpr, across: gl.constexpr):
    """Begins K q^T of the block in slot s: [128, HEADS]."""
    x = gl.zeros([SPAN, HEADS], gl.float32, layout=across)
    first = queries.index(0).permute((1, 0))
    x = warpgroup_mma(keys.index(s * PARTS), first, x, use_acc=False, is_async=True)
    if PARTS == 2:
        second = queries.index(1).permute((1, 0))
        x = warpgroup_mma(keys.index(s * PARTS + 1), second, x, is_async=True)
    return x


@gluon.jit
def _query(
    q, query_starts, request, group, q_row, q_head, PARTS: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    HEADS: gl.constexpr,
):  # fmt: skip
    """The parts of an item's query, [HEADS, 64] each."""
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    h = gl.arange(0, HEADS, layout=gl.SliceLayout(1, plain))
    d = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, plain))
    row, end = gl.load(query_starts + request).to(gl.int64), gl.load(query_starts + request + 1)
    at = q + row * q_row + (group * G + h)[:, None] * q_head + d[None, :]
    mine = ((h < G) & (end > row))[:, None]
    first = gl.load(at, mask=mine & (d < D)[None, :], other=0.0)
    second = first
    if PARTS == 2:
        second = gl.load(at + COLUMNS, mask=mine & (d + COLUMNS < D)[None, :], other=0.0)
    return first, second


@gluon.jit
def _block(
    state, mine, rings, q, turn, left, more, c, LAST: gl.constexpr, HEADS: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr, across: gl.constexpr, by_lane: gl.constexpr,
    chains: gl.constexpr,
):  # fmt: skip
    """A block whose scores are there, and beside it the scores of the next one.

    Args:
        state: scores, maximum, lanes and results so far.
        q: the next item's query, whose first block comes after the LAST one.
        left: keys of the item from this block on: what lies beyond is masked in the LAST.
        more: whether there is a next block.
    """
    x, m, lanes, acc0, acc1 = state
    queries, weights = mine
    keys, values, keys_ready, keys_free, values_ready, values_free = rings
    s, after = turn % STAGES, (turn + 1) % STAGES
    if LAST:
        # Nobody reads the item's own query any more: all its scores are there.
        queries.index(0).store(q[0])
        if PARTS == 2:
            queries.index(1).store(q[1])
        fence_async_shared()
        barrier()
    # After the last item's last block the slot holds what it may: nobody looks at those scores.
    mbarrier.wait(keys_ready.index(after), ((turn + 1) // STAGES) & 1, pred=more)
    coming = _scores(keys, after, queries, PARTS, HEADS, across)
    x = mul(x, gl.full([SPAN, HEADS], 0.0, gl.float32, layout=across) + c)
    if LAST:
        j = gl.arange(0, SPAN, layout=gl.SliceLayout(1, across))
        x = gl.where((j < left)[:, None], x, float("-inf"))
    top = gl.maximum(m, gl.max(x, 0))
    p = ex2(sub(x, top[None, :]))
    alpha = ex2(sub(m, top))
    weights.permute((1, 0)).store(p.to(weights.dtype))
    fence_async_shared()
    barrier()
    mbarrier.wait(values_ready.index(s), (turn // STAGES) & 1)
    if LAST:  # noqa: SIM102 - this is known to the compiler, the next line's question is not
        if left < SPAN:
            for part in gl.static_range(PARTS):
                clear_slots(values.index(s * PARTS + part), left)
    p_down = weights.permute((1, 0))
    acc0 = acc0 * alpha[None, :]
    token0 = warpgroup_mma(values.index(s * PARTS).permute((1, 0)), p_down, acc0, is_async=True)
    b = gl.convert_layout(alpha, gl.SliceLayout(1, by_lane))
    t = gl.convert_layout(lane_sums_down(gl.convert_layout(p, chains), HEADS), by_lane)
    lanes = fma(lanes, b[:, None], t)
    if PARTS == 2:
        acc1 = acc1 * alpha[None, :]
        token1 = warpgroup_mma(values.index(s * PARTS + 1).permute((1, 0)), p_down, acc1, is_async=True)
        acc0, acc1, x = warpgroup_mma_wait(0, deps=[token0, token1, coming])
    else:
        acc0, x = warpgroup_mma_wait(0, deps=[token0, coming])
    barrier()
    mbarrier.arrive(values_free.index(s))
    mbarrier.arrive(keys_free.index(after), pred=more)
    return x, top, lanes, acc0, acc1


@gluon.jit
def _consume(
    q, queries, weights, rings, out, tables, c, q_row, q_head, out_row, kv_heads, items,
    G: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    SETTLED: gl.constexpr,
):  # fmt: skip
    across: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEADS, 16]
    )
    # A thread has all keys of one lane for one head, so that the lane's chain is in its registers.
    chains: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [8, 0], [16, 0], [32, 0], [64, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[[0, 8], [0, 0]] if HEADS == 16 else [[0, 0], [0, 0]],
        block_bases=[],
        shape=[128, HEADS],
    )
    by_lane: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    keys, _, keys_ready, keys_free, _, _ = rings
    h = gl.arange(0, HEADS, layout=gl.SliceLayout(0, across))
    d = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, across))
    query_starts, step, first = tables[0], gl.num_programs(0), gl.program_id(0)
    request, context = context_of(tables, first, items, kv_heads, SETTLED)
    request1, context1 = context_of(tables, first + step, items, kv_heads, SETTLED)
    if SETTLED:
        gdc_wait()
    q0, q1 = _query(q, query_starts, request, first % kv_heads, q_row, q_head, PARTS, G, D, HEADS)
    queries.index(0).store(q0)
    if PARTS == 2:
        queries.index(1).store(q1)
    q0, q1 = _query(q, query_starts, request1, (first + step) % kv_heads, q_row, q_head, PARTS, G, D, HEADS)
    fence_async_shared()
    barrier()
    mbarrier.wait(keys_ready.index(0), 0, pred=first < items)
    x = warpgroup_mma_wait(0, deps=[_scores(keys, 0, queries, PARTS, HEADS, across)])
    barrier()
    mbarrier.arrive(keys_free.index(0))
    turn = 0
    for item in range(first, items, step):
        row = gl.load(query_starts + request).to(gl.int64)
        served = gl.load(query_starts + request + 1) > row
        last = blocks_of(context) - 1
        # Asked for two items before they are needed: loads that wait for loads.
        request2, context2 = context_of(tables, item + 2 * step, items, kv_heads, SETTLED)
        r0, r1 = _query(
            q, query_starts, request2, (item + 2 * step) % kv_heads, q_row, q_head, PARTS, G, D, HEADS
        )
        m = gl.full([HEADS], float("-inf"), gl.float32, layout=gl.SliceLayout(0, across))
        lanes = gl.zeros([HEADS, 4], gl.float32, layout=by_lane)
        acc0 = gl.zeros([COLUMNS, HEADS], gl.float32, layout=across)
        state = (x, m, lanes, acc0, acc0)
        for n in range(last):
            state = _block(
                state, (queries, weights), rings, (q0, q1), turn + n, context - n * SPAN, True, c,
                False, HEADS, PARTS, STAGES, across, by_lane, chains,
            )  # fmt: skip
        turn += last
        x, m, lanes, acc0, acc1 = _block(
            state, (queries, weights), rings, (q0, q1), turn, context - last * SPAN,
            item + step < items, c, True, HEADS, PARTS, STAGES, across, by_lane, chains,
        )  # fmt: skip
        turn += 1
        total = gl.convert_layout(row_total(lanes, HEADS), gl.SliceLayout(0, across))
        at = out + row * out_row + (item % kv_heads) * (G * D) + h[None, :] * D + d[:, None]
        mine = (served & (h < G))[None, :]
        result = gl.where(context > 0, acc0 / total[None, :], 0.0)
        gl.store(at, result.to(out.dtype.element_ty), mask=mine & (d < D)[:, None])
        if PARTS == 2:
            result = gl.where(context > 0, acc1 / total[None, :], 0.0)
            inside = mine & (d + COLUMNS < D)[:, None]
            gl.store(at + COLUMNS, result.to(out.dtype.element_ty), mask=inside)
        request, request1 = request1, request2
        context, context1 = context1, context2
        q0, q1 = r0, r1
    gdc_launch_dependents()


@gluon.jit(do_not_specialize=["items"])
def _decode_kernel(
    q, k, v, out, query_starts, context_lengths, block_tables, requests, counted, c,
    q_row, q_head, out_row, table_row, kv_heads, items,
    G: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    SETTLED: gl.constexpr, tile: gl.constexpr,
):  # fmt: skip
    """Axis: a program's first item; an item is a key/value head of a request.

    Where there is `counted`, int32 [1], it says how many requests there are. SETTLED: as in `PagedRows`.
    """
    keys = gl.allocate_shared_memory(k.dtype, [STAGES * PARTS, SPAN, COLUMNS], k.layout)
    values = gl.allocate_shared_memory(k.dtype, [STAGES * PARTS, SPAN, COLUMNS], k.layout)
    queries = gl.allocate_shared_memory(k.dtype, [PARTS, HEADS, COLUMNS], tile)
    weights = gl.allocate_shared_memory(k.dtype, [HEADS, SPAN], tile)
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(keys_ready.index(s), count=1)
        mbarrier.init(keys_free.index(s), count=1)
        mbarrier.init(values_ready.index(s), count=1)
        mbarrier.init(values_free.index(s), count=1)
    fence_async_shared()
    if not SETTLED:
        gdc_wait()
    if counted is not None:
        items = kv_heads * looked_up(counted, SETTLED)
    rings = (keys, values, keys_ready, keys_free, values_ready, values_free)
    tables = (query_starts, context_lengths, requests)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q, queries, weights, rings, out, tables, c, q_row, q_head, out_row, kv_heads, items,
                    G, D, HEADS, PARTS, STAGES, SETTLED,
                ),
            ),
            (
                produce,
                (
                    k, keys, keys_ready, keys_free, tables, block_tables, table_row, kv_heads, items,
                    PARTS, STAGES, SETTLED,
                ),
            ),
            (
                produce,
                (
                    v, values, values_ready, values_free, tables, block_tables, table_row, kv_heads, items,
                    PARTS, STAGES, SETTLED,
                ),
            ),
        ],
        [1, 1],
        [56, 56],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Streamed:
    """A member's free choices: blocks that a ring has room for, and registers of a thread at most."""

    stages: int = 3
    registers: int | None = None


def attention_streamed(
    q: torch.Tensor,
    cache: GpuKVCache,
    rows: GpuPagedRows,
    scale: float,
    *,
    streamed: Streamed,
    chosen: tuple[int, ...] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode: programs walk through requests and key/value heads, heads of at most 128 numbers.

    Args: as of `attention_tiled`, but that each of the chosen requests has one query, and
        streamed: the member.

    Returns:
        out; a request whose context length on the device is 0 gets zeros.

    Determinism:
        A row depends on its query and on its request's keys and values up to its position.
    """
    chosen, out = begin(q, rows, chosen, out)
    if chosen:
        requests = rows.requests(chosen)
        streamed_of(q, cache, rows, scale, requests, len(chosen), streamed=streamed, out=out)
    return out


def streamed_of(
    q: torch.Tensor,
    cache: GpuKVCache,
    rows: PagedRows,
    scale: float,
    requests: torch.Tensor | None,
    count: int,
    counted: torch.Tensor | None = None,
    *,
    streamed: Streamed,
    out: torch.Tensor,
) -> None:
    """The same of requests that are known on the device, int32 [count]; None: the first ones.

    If it is `counted` there how many of them there are, int32 [1], `count` is the most there may be.
    """
    _, kv_heads, page, D = cache.k.shape
    G = q.shape[1] // kv_heads
    items = kv_heads * count
    _decode_kernel[(min(items, multiprocessors()),)](
        q, rows_of(cache.k, page), rows_of(cache.v, page), out, rows.query_starts, rows.context_lengths,
        rows.block_tables, requests, counted, exponent_scale(scale), q.stride(0), q.stride(1), out.stride(0),
        rows.block_tables.stride(0), kv_heads, items,
        G=G, D=D, HEADS=padded_heads(G), PARTS=-(-D // COLUMNS.value),
        STAGES=streamed.stages, SETTLED=rows.settled, tile=layout(q.dtype), num_warps=4,
        maxnreg=streamed.registers, **early(),
    )  # fmt: skip
