"""The chain of `triton_phases.py` on Hopper, with its loads in warps of their own.

The chain's length is what a long context at small batch costs: one step per block of 128 keys, none of which
may begin before the one before has ended. Four producer warps look pages up and have the bulk copy engine
fetch values and weights, several blocks ahead; four consumer warps are left with the rescaling and the tensor
core's own steps. What they pass barriers in is not hidden behind the products but comes on top of them, so
blocks are handed over four at a time.

The order is that of `_chain_kernel` in `triton_phases.py`, instruction by instruction. Triton's interpreter
does not know Gluon, so that one is the text that runs on the CPU, and serves wherever this kernel can't.
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

RUN = gl.constexpr(4)  # blocks that are handed over together; look-ups and scales spell four out


@gluon.jit
def _look_up(sources, place, g, PADDED: gl.constexpr, HEADS: gl.constexpr, PAIR: gl.constexpr):
    """What a producer must know of a run of blocks: its pages, and the last one what rescales them."""
    _, _, alphas, sums = sources
    table, _, _, _, _, blocks, last_page = place
    n = g * RUN
    pages = (
        pair_of_pages(table, n, last_page, PAIR),
        pair_of_pages(table, n + 1, last_page, PAIR),
        pair_of_pages(table, n + 2, last_page, PAIR),
        pair_of_pages(table, n + 3, last_page, PAIR),
    )
    rows: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0])
    i = gl.arange(0, RUN * HEADS, layout=gl.SliceLayout(1, rows))
    at = gl.minimum(n + i // HEADS, blocks - 1) * PADDED + i % PADDED
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, rows))
    # The other three make no use of it, and so the compiler leaves it out.
    scales = (gl.load(alphas + at), gl.load(sums + at[:, None] * 4 + lane[None, :]))
    return pages, scales


@gluon.jit
def _refill(
    sources, rings, ready, free, place, g, known, G: gl.constexpr, RUNS: gl.constexpr, PAIR: gl.constexpr
):
    """Has a run of blocks copied; after the last block there may be copies of anything."""
    v, weights, _, _ = sources
    values_ring, weights_ring, alphas_ring, sums_ring = rings
    _, kv_heads, group, column, first_row, _, _ = place
    pages, scales = known
    s = g % RUNS
    mbarrier.wait(free.index(s), (g // RUNS + 1) & 1)
    if PAIR == 3:
        alphas_ring.index(s).store(scales[0])
        sums_ring.index(s).store(scales[1])
        barrier()
    size: gl.constexpr = v.block_type.nbytes * 2 + (weights.block_type.nbytes if PAIR == 0 else 0)
    mbarrier.expect(ready.index(s), size * RUN)
    for i in gl.static_range(RUN):
        to = s * RUN + i
        if PAIR == 0:
            at = [first_row + (g * RUN + i) * G, 0]
            bulk_copy(weights, at, ready.index(s), weights_ring.index(to))
        fetch_pair(v, values_ring.index(to), ready.index(s), pages[i], kv_heads, group, column, PAIR)


@gluon.jit
def _produce(
    sources, rings, ready, free, place,
    G: gl.constexpr, PADDED: gl.constexpr, HEADS: gl.constexpr, RUNS: gl.constexpr, PAIR: gl.constexpr,
):  # fmt: skip
    """Fetches two of each block's pages; the first of four warps its weights, the last what rescales it.

    Fewer warps can't issue all copies in the time that the consumers take.
    """
    _, _, _, _, _, blocks, _ = place
    runs = gl.cdiv(blocks, RUN)
    # Two names in turn: a register that is copied is waited for, and the look-up would be ahead of nothing.
    even = _look_up(sources, place, 0, PADDED, HEADS, PAIR)
    for g in range(0, runs, 2):
        odd = _look_up(sources, place, g + 1, PADDED, HEADS, PAIR)
        _refill(sources, rings, ready, free, place, g, even, G, RUNS, PAIR)
        even = _look_up(sources, place, g + 2, PADDED, HEADS, PAIR)
        if g + 1 < runs:
            _refill(sources, rings, ready, free, place, g + 1, odd, G, RUNS, PAIR)


@gluon.jit
def _scales(rings, s, i: gl.constexpr, HEADS: gl.constexpr, of_acc: gl.constexpr, by_lane: gl.constexpr):
    """What rescales block i of a run: its alphas, for acc and for the lanes, and its lane sums."""
    _, _, alphas_ring, sums_ring = rings
    alphas = alphas_ring.index(s).slice(i * HEADS, HEADS)
    sums = sums_ring.index(s).slice(i * HEADS, HEADS)
    return alphas.load(of_acc), alphas.load(gl.SliceLayout(1, by_lane)), sums.load(by_lane)


@gluon.jit
def _step(acc, lanes, scales, values, weights):
    """One block of the chain."""
    token = warpgroup_mma(
        values.permute((1, 0)), weights.permute((1, 0)), acc * scales[0][None, :], is_async=True
    )
    lanes = fma(lanes, gl.expand_dims(scales[1], 1), scales[2])
    return warpgroup_mma_wait(0, deps=[token]), lanes


@gluon.jit
def _consume(
    rings, ready, free, out, blocks, context,
    G: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Out [G, D] of this request, group and slice."""
    across: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEADS, 16]
    )
    by_lane: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    of_acc: gl.constexpr = gl.SliceLayout(0, across)
    values_ring, weights_ring, _, _ = rings
    acc = gl.zeros([COLUMNS, HEADS], gl.float32, layout=across)
    lanes = gl.zeros([HEADS, 4], gl.float32, layout=by_lane)
    whole = context // SPAN
    for g in range(gl.cdiv(blocks, RUN)):
        s = g % RUNS
        mbarrier.wait(ready.index(s), (g // RUNS) & 1)
        if (g + 1) * RUN <= whole:
            # All at once and before the products, between which there is then nothing but the chain.
            scales = (
                _scales(rings, s, 0, HEADS, of_acc, by_lane),
                _scales(rings, s, 1, HEADS, of_acc, by_lane),
                _scales(rings, s, 2, HEADS, of_acc, by_lane),
                _scales(rings, s, 3, HEADS, of_acc, by_lane),
            )
            for i in gl.static_range(RUN):
                at = s * RUN + i
                acc, lanes = _step(acc, lanes, scales[i], values_ring.index(at), weights_ring.index(at))
        else:
            for i in gl.static_range(RUN):
                n, at = g * RUN + i, s * RUN + i
                if n == whole:
                    clear_slots(values_ring.index(at), context - whole * SPAN)
                if n < blocks:
                    last = _scales(rings, s, i, HEADS, of_acc, by_lane)
                    acc, lanes = _step(acc, lanes, last, values_ring.index(at), weights_ring.index(at))
        barrier()
        mbarrier.arrive(free.index(s))
    total = gl.convert_layout(row_total(lanes, HEADS), of_acc)
    column = gl.arange(0, HEADS, layout=of_acc)
    d = gl.program_id(0) * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, across))
    result = gl.where(blocks > 0, acc / total[None, :], 0.0)
    inside = (column < G)[None, :] & (d < D)[:, None]
    gl.store(out + column[None, :] * D + d[:, None], result.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _chain_kernel(
    v, weights, alphas, sums, out, query_starts, context_lengths, block_tables, requests,
    out_row, table_row, most_blocks, kv_heads,
    G: gl.constexpr, D: gl.constexpr, PADDED: gl.constexpr, HEADS: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Axes: slice of columns, key/value head, request. alphas [.., B, PADDED], sums [.., B, PADDED, 4]."""
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
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    square: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    rings = (
        gl.allocate_shared_memory(v.dtype, [RUNS * RUN, SPAN, COLUMNS], v.layout),
        gl.allocate_shared_memory(v.dtype, [RUNS * RUN, HEADS, SPAN], weights.layout),
        gl.allocate_shared_memory(gl.float32, [RUNS, RUN * HEADS], flat),
        gl.allocate_shared_memory(gl.float32, [RUNS, RUN * HEADS, 4], square),
    )
    ready = gl.allocate_shared_memory(gl.int64, [RUNS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [RUNS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(RUNS):
        mbarrier.init(ready.index(s), count=4)
        mbarrier.init(free.index(s), count=1)
    fence_async_shared()
    sources = (
        v, weights, alphas + base.to(gl.int64) * PADDED, sums + base.to(gl.int64) * (PADDED * 4)
    )  # fmt: skip
    place = (table, kv_heads, group, column, base * G, blocks, last_page)
    to = out + row * out_row + group * (G * D)
    gl.warp_specialize(
        [
            (_consume, (rings, ready, free, to, blocks, context, G, D, HEADS, RUNS)),
            (_produce, (sources, rings, ready, free, place, G, PADDED, HEADS, RUNS, 0)),
            (_produce, (sources, rings, ready, free, place, G, PADDED, HEADS, RUNS, 1)),
            (_produce, (sources, rings, ready, free, place, G, PADDED, HEADS, RUNS, 2)),
            (_produce, (sources, rings, ready, free, place, G, PADDED, HEADS, RUNS, 3)),
        ],
        [1, 1, 1, 1],
        [48, 48, 48, 48],
    )


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
        G=group, D=D, PADDED=padded, HEADS=heads, RUNS=3 if heads == 8 else 2, num_warps=4, **early(),
    )  # fmt: skip
