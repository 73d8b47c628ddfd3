"""The second and third phase of `triton_phases.py` on Hopper, at the same time as the first.

The chain's length is what a long context at small batch costs: one step per block of 128 keys, none of which
may begin before the one before has ended. So it begins while scores are still being taken: the first phase's
kernel lets it begin at once, and counts the blocks that are there. Twice four warps make weights of scores as
they come; four look pages up and have the bulk copy engine fetch values, several blocks ahead; four are left
with the rescaling and the tensor core's own steps. What these pass barriers in is not hidden behind the
products but comes on top of them, so blocks are handed over four at a time, a run.

The order is that of `_weights_kernel` and `_chain_kernel` in `triton_phases.py`, instruction by instruction.
Triton's interpreter does not know Gluon, so they serve on the CPU, and wherever else this kernel can't. Tests
run this text, too.
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

from isobatch.kernels.attention import triton_phases
from isobatch.kernels.attention.gluon_steps import (
    barrier,
    clear_slots,
    fetch_pair,
    layout,
    padded_heads,
    pair_of_pages,
    rows_of,
)
from isobatch.kernels.attention.triton_steps import COLUMNS, PAGE, SPAN, lane_sums_down, row_total
from isobatch.kernels.gpu.overlap import acquired, early
from isobatch.kernels.gpu.ptx import ex2, fma, sub

RUN = gl.constexpr(triton_phases.RUN)  # four: look-ups and scales spell them out


@gluon.jit
def _look_up(place, g, PAIR: gl.constexpr):
    """A producer's pages of a run of blocks. It looks nothing up before its predecessor lets it begin, which
    has waited: no need to mark it."""
    table, _, _, _, _, last_page = place
    n = g * RUN
    return (
        pair_of_pages(table, n, last_page, PAIR, False),
        pair_of_pages(table, n + 1, last_page, PAIR, False),
        pair_of_pages(table, n + 2, last_page, PAIR, False),
        pair_of_pages(table, n + 3, last_page, PAIR, False),
    )


@gluon.jit
def _refill(v, values_ring, ready, free, place, g, pages, RUNS: gl.constexpr, PAIR: gl.constexpr):
    """Has a run of blocks copied; after the last block there may be copies of anything."""
    _, kv_heads, group, column, _, _ = place
    s = g % RUNS
    mbarrier.wait(free.index(s), (g // RUNS + 1) & 1)
    size: gl.constexpr = v.block_type.nbytes * 2
    mbarrier.expect(ready.index(s), size * RUN)
    for i in gl.static_range(RUN):
        to = values_ring.index(s * RUN + i)
        fetch_pair(v, to, ready.index(s), pages[i], kv_heads, group, column, PAIR)


@gluon.jit
def _produce(v, values_ring, ready, free, place, RUNS: gl.constexpr, PAIR: gl.constexpr):
    """Fetches two of each block's pages. Fewer than four warps can't issue all copies in time."""
    _, _, _, _, blocks, _ = place
    runs = gl.cdiv(blocks, RUN)
    # Two names in turn: a register that is copied is waited for, and the look-up would be ahead of nothing.
    even = _look_up(place, 0, PAIR)
    for g in range(0, runs, 2):
        odd = _look_up(place, g + 1, PAIR)
        _refill(v, values_ring, ready, free, place, g, even, RUNS, PAIR)
        even = _look_up(place, g + 2, PAIR)
        if g + 1 < runs:
            _refill(v, values_ring, ready, free, place, g + 1, odd, RUNS, PAIR)


@gluon.jit
def _scored(counts, known, g, blocks):
    """Waits for the scores of run g; returns how many runs from the first one on are known to be there.

    A look at 32 counts at once is one trip to the second-level cache, and mostly serves later runs, too. Each
    warp looks for itself.
    """
    runs = gl.cdiv(blocks, RUN)
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [4], [0]))
    while known <= g:
        run = known + lane
        there = acquired(counts + gl.minimum(run, runs - 1))
        missing = (run < runs) & (there < gl.minimum(blocks - run * RUN, RUN))
        known += gl.min(gl.where(missing, lane, 32), 0)
    barrier()  # what one thread has acquired all may read
    return known


@gluon.jit
def _weigh(
    scores, maxima, counts, rings, ready, free, blocks,
    G: gl.constexpr, HEADS: gl.constexpr, RUNS: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Makes the weights of every other run, and what rescales them, as `_weights_kernel` does.

    A warp takes a block. All four are one partition and run one text: eight of their own were slower.
    """
    _, weights_ring, alphas_ring, sums_ring = rings
    # A thread has all keys of one lane for one head, so that the lane's chain is in its registers.
    chains: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [8, 0], [16, 0], [32, 0], [64, 0]] + ([[0, 8]] if HEADS == 16 else []),
        lane_bases=[[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[[0, HEADS], [0, 2 * HEADS]],
        block_bases=[],
        shape=[128, RUN * HEADS],
    )
    j = gl.arange(0, SPAN, layout=gl.SliceLayout(1, chains))
    column = gl.arange(0, RUN * HEADS, layout=gl.SliceLayout(0, chains))
    # A head beyond the group's is any other one: its column of the sums goes nowhere.
    block, h = column // HEADS, gl.minimum(column % HEADS, G - 1)
    last = blocks - 1
    m = gl.full([RUN * HEADS], float("-inf"), gl.float32, layout=gl.SliceLayout(0, chains))
    known = 0
    for g in range(WHO, gl.cdiv(blocks, RUN), 2):
        first, s = g * RUN, g % RUNS
        known = _scored(counts, known, g, blocks)
        n = gl.minimum(first + block, last)
        x = gl.load(scores + (n * (SPAN * G) + h)[None, :] + (j * G)[:, None])
        # The run before is another's; of it only the maxima count here.
        for i in gl.static_range(RUN):
            before = gl.load(maxima + gl.maximum(first - RUN + i, 0) * G + h)
            m = gl.maximum(m, gl.where(first > 0, before, float("-inf")))
        before, top = m, m
        for i in gl.static_range(RUN):
            maximum = gl.load(maxima + gl.minimum(first + i, last) * G + h)
            before = gl.where(i < block, gl.maximum(before, maximum), before)
            top = gl.where(i <= block, gl.maximum(top, maximum), top)
            m = gl.maximum(m, maximum)
        p = ex2(sub(x, gl.expand_dims(top, 0)))
        alpha = ex2(sub(before, top))
        t = lane_sums_down(p, RUN * HEADS)
        mbarrier.wait(free.index(s), (g // RUNS + 1) & 1)
        weights_ring.index(s).permute((1, 0)).store(p.to(weights_ring.dtype))
        alphas_ring.index(s).store(alpha)
        sums_ring.index(s).store(t)
        fence_async_shared()
        barrier()
        mbarrier.arrive(ready.index(s))


@gluon.jit
def _scales(rings, s, i: gl.constexpr, HEADS: gl.constexpr, of_acc: gl.constexpr, by_lane: gl.constexpr):
    """What rescales block i of a run: its alphas, for acc and for the lanes, and its lane sums."""
    _, _, alphas_ring, sums_ring = rings
    alphas = alphas_ring.index(s).slice(i * HEADS, HEADS)
    sums = sums_ring.index(s).slice(i * HEADS, HEADS)
    return alphas.load(of_acc), alphas.load(gl.SliceLayout(1, by_lane)), sums.load(by_lane)


@gluon.jit
def _weights(rings, s, i: gl.constexpr, HEADS: gl.constexpr):
    """Of block i of a run."""
    return rings[1].index(s).slice(i * HEADS, HEADS)


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
    rings, ready, free, counts, out, served, blocks, context,
    G: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Out [G, D] of this request, group and slice."""
    across: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEADS, 16]
    )
    by_lane: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    of_acc: gl.constexpr = gl.SliceLayout(0, across)
    values_ring = rings[0]
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
                acc, lanes = _step(acc, lanes, scales[i], values_ring.index(at), _weights(rings, s, i, HEADS))
        else:
            for i in gl.static_range(RUN):
                n, at = g * RUN + i, s * RUN + i
                if n == whole:
                    clear_slots(values_ring.index(at), context - whole * SPAN)
                if n < blocks:
                    last = _scales(rings, s, i, HEADS, of_acc, by_lane)
                    acc, lanes = _step(acc, lanes, last, values_ring.index(at), _weights(rings, s, i, HEADS))
        barrier()
        mbarrier.arrive(free.index(s))
    gdc_wait()  # the scores are there: this is so that who waits for this kernel waits for all before it
    gdc_launch_dependents()
    # As they were found, for the next layer: nobody counts any more, and those who looked have handed over.
    run = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    for first in range(0, gl.cdiv(blocks, RUN), 128):
        gl.store(counts + first + run, gl.zeros_like(run), mask=first + run < gl.cdiv(blocks, RUN))
    total = gl.convert_layout(row_total(lanes, HEADS), of_acc)
    column = gl.arange(0, HEADS, layout=of_acc)
    d = gl.program_id(0) * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, across))
    result = gl.where(blocks > 0, acc / total[None, :], 0.0)
    inside = (served & (column < G))[None, :] & (d < D)[:, None]
    gl.store(out + column[None, :] * D + d[:, None], result.to(out.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["most_blocks"])
def _chain_kernel(
    v, scores, maxima, counts, out, query_starts, context_lengths, block_tables, requests,
    out_row, table_row, most_blocks,
    G: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, RUNS: gl.constexpr, tile: gl.constexpr,
):  # fmt: skip
    """Axes: slice of columns, key/value head, request. Scores and maxima are read as their counts go up."""
    group, item, kv_heads = gl.program_id(1), gl.program_id(2), gl.num_programs(1)
    request = item
    if requests is not None:
        request = gl.load(requests + item)
    row = gl.load(query_starts + request).to(gl.int64)
    served = gl.load(query_starts + request + 1) > row
    context = gl.where(served, gl.load(context_lengths + request), 0)
    blocks = gl.cdiv(context, SPAN)
    base = (item * kv_heads + group).to(gl.int64) * most_blocks
    table = block_tables + request.to(gl.int64) * table_row
    column, last_page = gl.program_id(0) * COLUMNS, gl.maximum(context - 1, 0) // PAGE
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    square: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    rings = (
        gl.allocate_shared_memory(v.dtype, [RUNS * RUN, SPAN, COLUMNS], v.layout),
        gl.allocate_shared_memory(v.dtype, [RUNS, RUN * HEADS, SPAN], tile),
        gl.allocate_shared_memory(gl.float32, [RUNS, RUN * HEADS], flat),
        gl.allocate_shared_memory(gl.float32, [RUNS, RUN * HEADS, 4], square),
    )
    ready = gl.allocate_shared_memory(gl.int64, [RUNS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [RUNS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(RUNS):
        mbarrier.init(ready.index(s), count=5)  # four producers, and who makes the weights
        mbarrier.init(free.index(s), count=1)
    fence_async_shared()
    place = (table, kv_heads, group, column, blocks, last_page)
    scores += base * (SPAN * G)
    maxima += base * G
    counts += ((item * kv_heads + group) * gl.num_programs(0) + gl.program_id(0)) * gl.cdiv(most_blocks, RUN)
    to = out + row * out_row + group * (G * D)
    gl.warp_specialize(
        [
            (_consume, (rings, ready, free, counts, to, served, blocks, context, G, D, HEADS, RUNS)),
            (_produce, (v, rings[0], ready, free, place, RUNS, 0)),
            (_produce, (v, rings[0], ready, free, place, RUNS, 1)),
            (_produce, (v, rings[0], ready, free, place, RUNS, 2)),
            (_produce, (v, rings[0], ready, free, place, RUNS, 3)),
            (_weigh, (scores, maxima, counts, rings, ready, free, blocks, G, HEADS, RUNS, 0)),
            (_weigh, (scores, maxima, counts, rings, ready, free, blocks, G, HEADS, RUNS, 1)),
        ],
        [1, 1, 1, 1, 4, 4],
        [40, 40, 40, 40, 128, 128],
    )


def chain(
    scores: torch.Tensor,
    maxima: torch.Tensor,
    counts: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    requests: torch.Tensor | None,
    *,
    count: int,
    blocks: int,
) -> None:
    """The second and third phase: weights out of scores, and out = the chain over blocks of values.

    Args:
        scores: float32 [count, Hkv, blocks, 128, group], which the first phase may still be writing.
        maxima: float32 [count, Hkv, blocks, group], likewise.
        counts: int32 [count * Hkv, slices of 64 columns, runs], of blocks of which both are there; zeroed.
        v: the cache's values [pages, Hkv, 16, D].
        out: [T, H, D], of at most 16 heads per key/value head.
        query_starts: int32 [R + 1].
        context_lengths: int32 [R].
        block_tables: int32 [R, pages of a request].
        requests: int32 [count], which requests; None for the first `count`.
        count: requests served.
        blocks: of 128 keys that there is room for.

    Determinism:
        As of `attention_phases`.
    """
    _, kv_heads, page, D = v.shape
    group = out.shape[1] // kv_heads
    heads = padded_heads(group)
    _chain_kernel[(counts.shape[1], kv_heads, count)](
        rows_of(v, page), scores, maxima, counts, out, query_starts, context_lengths, block_tables, requests,
        out.stride(0), block_tables.stride(0), blocks,
        G=group, D=D, HEADS=heads, RUNS=3 if heads == 8 else 2, tile=layout(v.dtype), num_warps=4, **early(),
    )  # fmt: skip
