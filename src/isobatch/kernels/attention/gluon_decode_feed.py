"""The producers of `gluon_decode.py`: who is served, in which order, and the copies of their blocks."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_wait

from isobatch.kernels.attention.gluon_steps import fetch_pair, pair_of_pages
from isobatch.kernels.attention.triton_steps import COLUMNS, PAGE, SPAN
from isobatch.kernels.gpu.overlap import looked_up


@gluon.jit
def _refill(
    source, ring, ready, free, kv_heads, group, n, pages, PARTS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    s = n % STAGES
    mbarrier.wait(free.index(s), (n // STAGES + 1) & 1)
    mbarrier.expect(ready.index(s), source.block_type.nbytes * 8 * PARTS)
    for part in gl.static_range(PARTS):
        for pair in gl.static_range(4):
            at = ring.index(s * PARTS + part)
            fetch_pair(source, at, ready.index(s), pages[pair], kv_heads, group, part * COLUMNS, pair)


@gluon.jit
def _pages(table, n, last, SETTLED: gl.constexpr):
    return (
        pair_of_pages(table, n, last, 0, SETTLED),
        pair_of_pages(table, n, last, 1, SETTLED),
        pair_of_pages(table, n, last, 2, SETTLED),
        pair_of_pages(table, n, last, 3, SETTLED),
    )


@gluon.jit
def context_of(tables, item, items, kv_heads, SETTLED: gl.constexpr):
    """(the request, its keys) of an item, of the last one beyond it. Without queries, no keys.

    Of no items at all it is what stands first in the tables, and nobody looks at that.
    """
    query_starts, context_lengths, requests = tables
    request = gl.maximum(gl.minimum(item, items - 1), 0) // kv_heads
    if requests is not None:
        request = looked_up(requests + request, SETTLED)
    begin, end = looked_up(query_starts + request, SETTLED), looked_up(query_starts + request + 1, SETTLED)
    return request, gl.where(end > begin, looked_up(context_lengths + request, SETTLED), 0)


@gluon.jit
def blocks_of(context):
    """Of an item. One without keys has a block all the same, of which nothing is seen: all are alike."""
    return gl.maximum(gl.cdiv(context, SPAN), 1)


@gluon.jit
def _last_page(context):
    return gl.maximum(context - 1, 0) // PAGE


@gluon.jit
def produce(
    source, ring, ready, free, tables, block_tables, table_row, kv_heads, items,
    PARTS: gl.constexpr, STAGES: gl.constexpr, SETTLED: gl.constexpr,
):  # fmt: skip
    """Copies the keys, or values, of all this program's items, block after block, into the ring's slots."""
    step, first = gl.num_programs(0), gl.program_id(0)
    request, context = context_of(tables, first, items, kv_heads, SETTLED)
    table = block_tables + request.to(gl.int64) * table_row
    even = _pages(table, 0, _last_page(context), SETTLED)
    # Who comes next is looked up two items before, and the first pages one before: loads that wait for loads.
    request1, context1 = context_of(tables, first + step, items, kv_heads, SETTLED)
    if SETTLED:
        gdc_wait()
    turn = 0
    for item in range(first, items, step):
        group, blocks, last = item % kv_heads, blocks_of(context), _last_page(context)
        table1 = block_tables + request1.to(gl.int64) * table_row
        coming = _pages(table1, 0, _last_page(context1), SETTLED)
        context = context1
        request1, context1 = context_of(tables, item + 2 * step, items, kv_heads, SETTLED)
        # Two names in turn: a register that is copied is waited for, and was asked for in vain.
        for n in range(0, blocks, 2):
            odd = _pages(table, n + 1, last, SETTLED)
            _refill(source, ring, ready, free, kv_heads, group, turn + n, even, PARTS, STAGES)
            if n + 2 < blocks:
                even = _pages(table, n + 2, last, SETTLED)
            if n + 1 < blocks:
                _refill(source, ring, ready, free, kv_heads, group, turn + n + 1, odd, PARTS, STAGES)
        turn += blocks
        table, even = table1, coming
