"""The chain of `triton_phases.py` on Hopper, with its loads in warps of their own.

The chain's length is what a long context at small batch costs: one step per block of 128 keys, none of which
may begin before the one before has ended. Four producer warps look pages up and have the bulk copy engine
fetch values and weights, several blocks ahead; four consumer warps are left with a barrier that has long been
passed, the rescaling and the tensor core's own steps.

The order is that of `_chain_kernel`, instruction by instruction. Triton's interpreter does not know Gluon, so
`_chain_kernel` is the text that runs on the CPU, and serves wherever this kernel can't.
"""

from __future__ import annotations

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

from isobatch.kernels.attention.gluon_steps import (
    COLUMNS,
    PAGE,
    SPAN,
    barrier,
    bulk_copy,
    clear_slots,
    fetch_pair,
    padded_heads,
    pair_of_pages,
    rows_of,
)
from isobatch.kernels.attention.triton_steps import row_total
from isobatch.kernels.gpu.overlap import early
from isobatch.kernels.gpu.ptx import fma

_STAGES = 8


@gluon.jit
def _refill(
    v, weights, values_ring, weights_ring, ready, free, kv_heads, group, column, first_row, n, pages,
    G: gl.constexpr, STAGES: gl.constexpr, PAIR: gl.constexpr,
):  # fmt: skip
    s = n % STAGES
    mbarrier.wait(free.index(s), (n // STAGES + 1) & 1)
    size: gl.constexpr = v.block_type.nbytes * 2 + (weights.block_type.nbytes if PAIR == 0 else 0)
    mbarrier.expect(ready.index(s), size)
    if PAIR == 0:
        at = [first_row + n * G, 0]
        bulk_copy(weights, at, ready.index(s), weights_ring.index(s))
    fetch_pair(v, values_ring.index(s), ready.index(s), pages, kv_heads, group, column, PAIR)


@gluon.jit
def _produce(feed, G: gl.constexpr, STAGES: gl.constexpr, PAIR: gl.constexpr):
    """Fetches two of each block's pages, and the first of four warps its weights.

    Fewer warps can't issue all copies in the time that the consumers take.
    """
    (
        v, weights, values_ring, weights_ring, ready, free, table, kv_heads, group, column, first_row, blocks,
        last_page,
    ) = feed  # fmt: skip
    # Two names in turn: a register that is copied is waited for, and the look-up would be ahead of nothing.
    even = pair_of_pages(table, 0, last_page, PAIR)
    for n in range(0, blocks, 2):
        odd = pair_of_pages(table, n + 1, last_page, PAIR)
        _refill(
            v, weights, values_ring, weights_ring, ready, free, kv_heads, group, column, first_row, n, even,
            G, STAGES, PAIR,
        )  # fmt: skip
        even = pair_of_pages(table, n + 2, last_page, PAIR)
        if n + 1 < blocks:
            _refill(
                v, weights, values_ring, weights_ring, ready, free, kv_heads, group, column, first_row, n + 1,
                odd, G, STAGES, PAIR,
            )  # fmt: skip


@gluon.jit
def _scales(alphas, sums, n, h, g, lane, PADDED: gl.constexpr):
    """Block n's alphas, for acc and for the lanes, and its lane sums."""
    at = n * PADDED
    return (
        gl.load(alphas + at + h % PADDED),
        gl.load(alphas + at + g % PADDED),
        gl.load(sums + (at + g % PADDED)[:, None] * 4 + lane[None, :]),
    )


@gluon.jit
def _step(acc, lanes, scales, values_ring, weights_ring, ready, free, n, STAGES: gl.constexpr):
    """One block of the chain; its slots have been cleared where it is not whole."""
    s = n % STAGES
    acc = acc * scales[0][None, :]
    lanes = fma(lanes, scales[1][:, None], scales[2])
    mbarrier.wait(ready.index(s), (n // STAGES) & 1)
    token = warpgroup_mma(
        values_ring.index(s).permute((1, 0)), weights_ring.index(s).permute((1, 0)), acc, is_async=True
    )
    acc = warpgroup_mma_wait(0, deps=[token])
    barrier()
    mbarrier.arrive(free.index(s))
    return acc, lanes


@gluon.jit
def _consume(
    values_ring, weights_ring, ready, free, alphas, sums, out, blocks, context,
    G: gl.constexpr, D: gl.constexpr, PADDED: gl.constexpr, HEADS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """alphas [B, PADDED], sums [B, PADDED, 4] and out [G, D] of this request, group and slice."""
    across: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEADS, 16]
    )
    by_lane: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    h = gl.arange(0, HEADS, layout=gl.SliceLayout(0, across))
    g = gl.arange(0, HEADS, layout=gl.SliceLayout(1, by_lane))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, by_lane))
    acc = gl.zeros([COLUMNS, HEADS], gl.float32, layout=across)
    lanes = gl.zeros([HEADS, 4], gl.float32, layout=by_lane)
    whole, last = context // SPAN, gl.maximum(blocks - 1, 0)
    # What rescales a block is asked for four steps before, into the registers that were last read.
    s0 = _scales(alphas, sums, 0, h, g, lane, PADDED)
    s1 = _scales(alphas, sums, gl.minimum(1, last), h, g, lane, PADDED)
    s2 = _scales(alphas, sums, gl.minimum(2, last), h, g, lane, PADDED)
    s3 = _scales(alphas, sums, gl.minimum(3, last), h, g, lane, PADDED)
    for n in range(0, whole - 3, 4):
        acc, lanes = _step(acc, lanes, s0, values_ring, weights_ring, ready, free, n, STAGES)
        s0 = _scales(alphas, sums, gl.minimum(n + 4, last), h, g, lane, PADDED)
        acc, lanes = _step(acc, lanes, s1, values_ring, weights_ring, ready, free, n + 1, STAGES)
        s1 = _scales(alphas, sums, gl.minimum(n + 5, last), h, g, lane, PADDED)
        acc, lanes = _step(acc, lanes, s2, values_ring, weights_ring, ready, free, n + 2, STAGES)
        s2 = _scales(alphas, sums, gl.minimum(n + 6, last), h, g, lane, PADDED)
        acc, lanes = _step(acc, lanes, s3, values_ring, weights_ring, ready, free, n + 3, STAGES)
        s3 = _scales(alphas, sums, gl.minimum(n + 7, last), h, g, lane, PADDED)
    for n in range(whole // 4 * 4, blocks):
        if n == whole:
            s = n % STAGES
            mbarrier.wait(ready.index(s), (n // STAGES) & 1)
            clear_slots(values_ring.index(s), context - whole * SPAN)
        acc, lanes = _step(acc, lanes, s0, values_ring, weights_ring, ready, free, n, STAGES)
        s0, s1, s2 = s1, s2, s3
    total = gl.convert_layout(row_total(lanes, HEADS), gl.SliceLayout(0, across))
    d = gl.program_id(0) * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, across))
    result = gl.where(blocks > 0, acc / total[None, :], 0.0)
    inside = (h < G)[None, :] & (d < D)[:, None]
    gl.store(out + h[None, :] * D + d[:, None], result.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _chain_kernel(
    v, weights, alphas, sums, out, query_starts, context_lengths, block_tables, requests,
    out_row, table_row, most_blocks, kv_heads,
    G: gl.constexpr, D: gl.constexpr, PADDED: gl.constexpr, HEADS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Axes: slice of columns, key/value head, request."""
    gdc_wait()
    gdc_launch_dependents()
    group, item = gl.program_id(1), gl.program_id(2)
    request = item
    if requests is not None:
        request = gl.load(requests + item)
    context = gl.load(context_lengths + request)
    row = gl.load(query_starts + request).to(gl.int64)
    if gl.load(query_starts + request + 1) <= row:
        return
    blocks = gl.cdiv(context, SPAN)
    base = (item * kv_heads + group) * most_blocks
    table = block_tables + request.to(gl.int64) * table_row
    column, last_page = gl.program_id(0) * COLUMNS, gl.maximum(context - 1, 0) // PAGE
    values_ring = gl.allocate_shared_memory(v.dtype, [STAGES, SPAN, COLUMNS], v.layout)
    weights_ring = gl.allocate_shared_memory(v.dtype, [STAGES, HEADS, SPAN], weights.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=4)
        mbarrier.init(free.index(s), count=1)
    fence_async_shared()
    feed = (
        v, weights, values_ring, weights_ring, ready, free, table, kv_heads, group, column, base * G, blocks,
        last_page,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    values_ring, weights_ring, ready, free, alphas + base.to(gl.int64) * PADDED,
                    sums + base.to(gl.int64) * (PADDED * 4), out + row * out_row + group * (G * D), blocks,
                    context, G, D, PADDED, HEADS, STAGES,
                ),
            ),
            (_produce, (feed, G, STAGES, 0)),
            (_produce, (feed, G, STAGES, 1)),
            (_produce, (feed, G, STAGES, 2)),
            (_produce, (feed, G, STAGES, 3)),
        ],
        [1, 1, 1, 1],
        [32, 32, 32, 32],
    )  # fmt: skip


def chain(
    weights: torch.Tensor,
    alphas: torch.Tensor,
    sums: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    requests: torch.Tensor | None,
    *,
    count: int,
    blocks: int,
    group: int,
    padded: int,
) -> None:
    """The third phase: out = the chain over blocks of values, by weights that the second phase has made.

    Args:
        weights: of v's dtype [count, Hkv, blocks, group, 128].
        alphas: float32 [count, Hkv, blocks, padded].
        sums: float32 [count, Hkv, blocks, padded, 4].
        v: the cache's values [pages, Hkv, 16, D].
        out: [T, H, D].
        query_starts: int32 [R + 1].
        context_lengths: int32 [R].
        block_tables: int32 [R, pages of a request].
        requests: int32 [count], which requests; None for the first `count`.
        count: requests served.
        blocks: of 128 keys that there is room for.
        group: query heads of a key/value head, at most 16.
        padded: what `group` is padded to in alphas and sums.

    Determinism:
        As of `attention_phases`.
    """
    _, kv_heads, page, D = v.shape
    heads = padded_heads(group)
    _chain_kernel[(-(-D // COLUMNS.value), kv_heads, count)](
        rows_of(v, page), rows_of(weights, heads, 128),
        alphas, sums, out, query_starts, context_lengths, block_tables, requests,
        out.stride(0), block_tables.stride(0), blocks, kv_heads,
        G=group, D=D, PADDED=padded, HEADS=heads, STAGES=_STAGES, num_warps=4, **early(),
    )  # fmt: skip
