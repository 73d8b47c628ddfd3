"""Tiles that another member could not compute, once more and with care, by the code of `triton.py`.

A tensor core multiplies what is masked, too, and a weight of zero is no help against a value that is NaN or
infinite. A member that finds such a thing in its results says where; here those tiles are computed so that no
row has a part of what it does not see. It is rare, so all that must be fast is to find nothing to do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.attention.launch import exponent_scale
from isobatch.kernels.attention.triton import attend_tile
from isobatch.kernels.gpu.device import multiprocessors
from isobatch.kernels.gpu.overlap import early, inputs_ready, next_may_begin

PIECE_ROWS = 16
"""Rows of a piece of a tile. With more, and care, threads need a stack, and what runs next is slower then."""


@triton.jit
def _marks(spoilt, items, end, ROWS: tl.constexpr):
    """Of the rows of those pieces before `end`, [items, ROWS]."""
    at = spoilt + items.to(tl.int64)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    return tl.load(at, mask=(items < end)[:, None], other=0)


@triton.jit(do_not_specialize=["count", "each"])
def _again_kernel(
    q, k, v, out, query_starts, context_lengths, block_tables, tiles, spoilt, c,
    q_row, q_head, out_row, table_row, count, each,
    block_stride: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A program looks through `each` of the pieces of all heads' tiles.

    It looks at all before it does any: what the second loop prepares would else be prepared by every program.
    """
    inputs_ready()
    next_may_begin()
    begin = tl.program_id(0) * each
    end = tl.minimum(begin + each, count * H * PIECES)
    found = tl.zeros((AT_ONCE, ROWS), tl.int8)
    for start in range(begin, end, AT_ONCE):
        found |= _marks(spoilt, start + tl.arange(0, AT_ONCE), end, ROWS)
    if tl.max(tl.reshape(found, (AT_ONCE * ROWS,)).to(tl.int32), 0) == 0:
        return
    for item in range(begin, end):
        mark = _marks(spoilt, item + tl.arange(0, 1), end, ROWS)
        if tl.max(tl.reshape(mark, (ROWS,)).to(tl.int32), 0) > 0:
            piece, head = item % PIECES, item // PIECES % H
            tile = item // (PIECES * H)
            request, first = tl.load(tiles + tile), tl.load(tiles + count + tile) + piece * ROWS
            row = tl.load(query_starts + request)
            queries = tl.load(query_starts + request + 1) - row
            attend_tile(
                q, k, v, out, block_tables, c, q_row, q_head, out_row, table_row, request, first,
                head, row, queries, tl.load(context_lengths + request),
                block_stride, G, D, WIDTH, ROWS, ROWS, False, False, True, True, True, 1,
            )  # fmt: skip


def attention_again(
    q: torch.Tensor,
    cache: GpuKVCache,
    rows: GpuPagedRows,
    scale: float,
    tiles: torch.Tensor,
    spoilt: torch.Tensor,
    *,
    out: torch.Tensor,
) -> None:
    """Those tiles of queries of one head that another member could not compute.

    Args:
        q: bf16 or fp16 [T, H, D], on the device, D contiguous.
        cache: of the layer.
        rows: whose queries these are.
        scale: of the scores, positive.
        tiles: int32 [2, tiles], contiguous: of each tile the request, and the tile's first query within it.
        spoilt: int8 [tiles, H, a multiple of PIECE_ROWS], a tile's rows that are not yet what they must be.
        out: where to write, like q and contiguous.

    Determinism:
        As `attention_tiled`, bit for bit.
    """
    count, H, height = spoilt.shape
    pieces, D = height // PIECE_ROWS, q.shape[2]
    items = count * H * pieces
    each = -(-items // multiprocessors())
    _again_kernel[(-(-items // each),)](
        q, cache.k, cache.v, out, rows.query_starts, rows.context_lengths, rows.block_tables, tiles, spoilt,
        exponent_scale(scale), q.stride(0), q.stride(1), out.stride(0), rows.block_tables.stride(0),
        count, each,
        block_stride=cache.k.stride(0), H=H, G=H // cache.k.shape[1], D=D, WIDTH=triton.next_power_of_2(D),
        PIECES=pieces, ROWS=PIECE_ROWS, AT_ONCE=128, num_warps=8, **early(),
    )  # fmt: skip
