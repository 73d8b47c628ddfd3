"""Paged attention on the GPU, in the order of cuDNN's fused attention on Hopper.

Written order, for a query at position p, a function of p and the keys and values 0..p alone. Storage is
bf16 or fp16; everything else is float32 with subnormal numbers flushed:
- Keys from position 0 in blocks of 128, ascending. s_j = q . k_j in tensor-core steps of 16, d ascending.
- x_j = round(s_j * c) with c = float32(log2(e) * scale); m' = max(m, max x_j).
- p_j = ex2.approx(round(x_j - m')): multiplication and subtraction rounded apart. a = ex2.approx(m - m').
- Four row-sum lanes: lane t adds, from zero, the p_j of the block with (j mod 8) // 2 == t, j ascending; then
  L_t = fma(L_t, a, that). The sum takes p_j in float32, before it is rounded for the product.
- acc = acc * a, subnormal numbers kept, then acc += p_j v_j in tensor-core steps of 16 keys, j ascending, p_j
  in the storage dtype.
- l = (L_0 + L_1) + (L_2 + L_3); out = acc / l, rounded once to the storage dtype.

Tiles hold queries of one head, or the heads that share a key/value head ("packed", so that decode reads keys
and values once for the group). Rows of a tile never meet in a sum, so tile shape, warps, stages and the
tensor core's instruction are free, and certified. The members in three phases are in `triton_phases.py`, the
library's in `cudnn.py`.

Shape letters: T query rows, R requests, H heads, Hkv key/value heads, G = H / Hkv, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.attention.launch import begin, exponent_scale
from isobatch.kernels.attention.triton_steps import (
    PAGE,
    SPAN,
    only_finite,
    page_rows,
    pages_of,
    product,
    row_total,
    softmax_block,
    unseen_is_inert,
)
from isobatch.kernels.gpu.overlap import early, inputs_ready, next_may_begin
from isobatch.kernels.layout import PagedRows, TiledRows


@triton.jit
def _tile_of(source, table, start, group, keys, block_stride, MASK: tl.constexpr, PAGED: tl.constexpr,
             D: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Keys or values start..start + 127 of a request, [128, WIDTH]; MASK: zeros from `keys` on."""
    j = start + tl.arange(0, SPAN)
    d = tl.arange(0, WIDTH)
    inside = (d < D)[None, :]
    if PAGED:
        at = source + page_rows(pages_of(table, start, keys), block_stride, group * (PAGE * D), D, 0, WIDTH)
        if MASK:
            tile = tl.load(at, mask=(j < keys)[:, None] & inside, other=0.0)
        elif WIDTH == D:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=inside, other=0.0)
    else:
        tile = tl.reshape(source.load([table + start, group, 0]), (SPAN, WIDTH))
        if MASK:
            tile = tl.where((j < keys)[:, None], tile, 0.0)
    return tile


@triton.jit
def _attend_blocks(
    acc, m, lanes, q, k, v, table, group, begin, end, position, keys, block_stride, c,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MASK: tl.constexpr, INERT: tl.constexpr,
    PAGED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys begin..end, in blocks. MASK: some row may not see them all; INERT: what a row does not see is no
    part of its sum even where it is NaN or infinite, though another row of the tile sees it."""
    for start in tl.range(begin, end, SPAN, num_stages=STAGES):
        kj = _tile_of(k, table, start, group, keys, block_stride, False, PAGED, D, WIDTH)
        s = product(q, tl.trans(kj), None)
        seen = (start + tl.arange(0, SPAN))[None, :] <= position[:, None]
        if MASK:
            s = tl.where(seen, s, float("-inf"))
        p, alpha, m, lanes = softmax_block(s, m, lanes, c, ROWS)
        p = p.to(q.dtype)
        # What lies beyond the keys may hold anything, and 0 * NaN is NaN.
        vj = _tile_of(v, table, start, group, keys, block_stride, MASK, PAGED, D, WIDTH)
        acc = acc * alpha[:, None]
        if INERT:
            acc = product(p, only_finite(vj), acc)
            acc = unseen_is_inert(acc, p, vj, seen)
        else:
            acc = product(p, vj, acc)
    return acc, m, lanes


@triton.jit
def attend_tile(
    q, k, v, out, block_tables, c, q_row, q_head, out_row, table_row, request, first, head, begin, queries,
    context,
    block_stride: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    HEIGHT: tl.constexpr, PACKED: tl.constexpr, SINGLE: tl.constexpr, MEET: tl.constexpr,
    PAGED: tl.constexpr, CARE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A request's tile of query rows, `first` on, of a head, or of a group's if PACKED.

    The request has `queries` rows from row `begin` on, the last of them at position `context` - 1.

    SINGLE: requests have one query, and padded ones no keys. MEET: a tile may hold several queries, of which
    some see keys that others do not. CARE: a value is known to be NaN
    or infinite, so the tile is begun with care.
    """
    r = tl.arange(0, ROWS)
    if PACKED:
        group = head
        query = (first + r) // G
        h = head * G + (first + r) % G
        last = (first + HEIGHT - 1) // G
    else:
        group = head // G
        query = first + r
        h = tl.full((ROWS,), 0, tl.int32) + head
        last = first + HEIGHT - 1
    mine = (r < HEIGHT) & (query < queries)
    before = context - queries
    position = before + tl.minimum(query, queries - 1)
    # Keys that some row of the tile sees, and blocks of keys that all its rows see.
    keys = tl.minimum(before + last + 1, context)
    whole = (before + (first // G if PACKED else first) + 1) // SPAN * SPAN

    d = tl.arange(0, WIDTH)
    inside = mine[:, None] & (d < D)[None, :]
    rows = (begin + query).to(tl.int64)
    qs = tl.load(q + (rows * q_row + h * q_head)[:, None] + d[None, :], mask=inside, other=0.0)
    if PAGED:
        table = block_tables + request.to(tl.int64) * table_row
    else:
        table = tl.load(block_tables + request)  # where the request's keys begin
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    lanes = tl.zeros((ROWS, 4), tl.float32)
    if not MEET:
        # One loop, so that the last block's keys are on their way while the ones before are worked on.
        acc, m, lanes = _attend_blocks(
            acc, m, lanes, qs, k, v, table, group, 0, keys, position, keys, block_stride, c,
            D, WIDTH, ROWS, True, False, PAGED, STAGES,
        )  # fmt: skip
    else:
        if not CARE:
            acc, m, lanes = _attend_blocks(
                acc, m, lanes, qs, k, v, table, group, 0, whole, position, keys, block_stride, c,
                D, WIDTH, ROWS, False, False, PAGED, STAGES,
            )  # fmt: skip
            acc, m, lanes = _attend_blocks(
                acc, m, lanes, qs, k, v, table, group, whole, keys, position, keys, block_stride, c,
                D, WIDTH, ROWS, True, False, PAGED, 1,
            )  # fmt: skip
            again = tl.min((tl.abs(acc) < float("inf")).to(tl.int32)) == 0
        else:
            again = True
        # 0 * NaN and 0 * inf are NaN, and stay it: where all is finite, no row saw what it must not. Where
        # not, which is rare, the tile is begun again with care, which takes more registers than there are.
        if again:
            acc = tl.zeros((ROWS, WIDTH), tl.float32)
            m = tl.full((ROWS,), float("-inf"), tl.float32)
            lanes = tl.zeros((ROWS, 4), tl.float32)
            acc, m, lanes = _attend_blocks(
                acc, m, lanes, qs, k, v, table, group, 0, keys, position, keys, block_stride, c,
                D, WIDTH, ROWS, True, True, PAGED, 1,
            )  # fmt: skip
    next_may_begin()
    result = acc / row_total(lanes, ROWS)[:, None]
    if SINGLE:
        result = tl.where(context > 0, result, 0.0)  # a padded request
    at = (rows * out_row + h * D)[:, None] + d[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _attention_kernel(
    q, k, v, out, query_starts, context_lengths, block_tables, requests, tiles, c,
    q_row, q_head, out_row, table_row, count,
    block_stride: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    HEIGHT: tl.constexpr,
    PACKED: tl.constexpr, LISTED: tl.constexpr, SINGLE: tl.constexpr, MEET: tl.constexpr,
    PAGED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of query rows. Axis 0: heads, or key/value heads if PACKED; axis 1: tiles.

    LISTED: tiles come from a list; otherwise requests have one query (SINGLE) and cdiv(G, HEIGHT) tiles each.
    MEET: a tile may hold several queries, of which some see keys that others do not.
    """
    inputs_ready()
    item = tl.program_id(1)
    head = tl.program_id(0)
    if LISTED:
        request = tl.load(tiles + item)
        first = tl.load(tiles + count + item)
    else:
        request = item // ((G + HEIGHT - 1) // HEIGHT)
        first = item % ((G + HEIGHT - 1) // HEIGHT) * HEIGHT
        if requests is not None:
            request = tl.load(requests + request)
    begin = tl.load(query_starts + request)
    queries = tl.load(query_starts + request + 1) - begin
    context = tl.load(context_lengths + request)
    if queries <= 0:
        return
    attend_tile(
        q, k, v, out, block_tables, c, q_row, q_head, out_row, table_row, request, first, head, begin,
        queries, context,
        block_stride, G, D, WIDTH, ROWS, HEIGHT, PACKED, SINGLE, MEET, PAGED, False, STAGES,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tile:
    """A member's free choices.

    Args:
        rows: of the tensor core's tile.
        warps: that share out the rows, or the columns where rows are few.
        stages: of the pipeline.
        packed: whether a tile holds the heads of a group, query after query, or queries of one head.
        height: rows that are used; None for all.
    """

    rows: int
    warps: int
    stages: int
    packed: bool
    height: int | None = None


def attention_tiled(
    q: torch.Tensor,
    cache: GpuKVCache,
    rows: GpuPagedRows,
    scale: float,
    *,
    tile: Tile,
    chosen: tuple[int, ...] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention by tiles of query rows, over a paged cache.

    Args:
        q: bf16 or fp16 [T, H, D], on the device, D contiguous.
        cache: of the layer, with this step's own keys and values already written.
        rows: whose queries these are.
        scale: of the scores, positive.
        tile: the member.
        chosen: the requests to serve; all by default. If all of them have one query, no list of tiles is
            needed, and a request whose context length on the device is 0 gets zeros.
        out: where to write, like q and contiguous; made if None.

    Returns:
        out; rows of requests that were not chosen are left alone.

    Determinism:
        A row depends on its query and on its request's keys and values up to its position.
    """
    chosen, out = begin(q, rows, chosen, out)
    _launch(q, cache.k, cache.v, rows, rows.block_tables, scale, tile, chosen, out)
    return out


def attention_listed(
    q: torch.Tensor, cache: GpuKVCache, rows: TiledRows, scale: float, *, tile: Tile
) -> torch.Tensor:
    """The same over tiles that are cut already.

    Args: as of `attention_tiled`, but that `rows` has the tiles, cut for
        tile: a packed member.

    Returns:
        Like q, contiguous. What belongs to no tile is anything.

    Determinism:
        As `attention_tiled`, bit for bit.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tables, items = rows.block_tables, rows.tiles.shape[1]
    _launch_items(q, cache.k, cache.v, rows, tables, scale, tile, None, rows.tiles, items, out)
    return out


def attention_contiguous(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    origins: torch.Tensor,
    rows: GpuPagedRows,
    scale: float,
    *,
    tile: Tile,
    chosen: tuple[int, ...],
    out: torch.Tensor,
) -> torch.Tensor:
    """The same over keys and values that lie in one piece per request, read by the bulk copy engine.

    Args:
        q: bf16 or fp16 [T, H, D], on the device, D contiguous.
        key: likewise [N, Hkv, D]: strides of 16 bytes or multiples, begins at 16 bytes.
        value: likewise.
        origins: int32 [R]: the row of `key` and `value` with each request's position 0.
        rows: whose queries these are.
        scale: of the scores, positive.
        tile: the member.
        chosen: the requests to serve.
        out: where to write, like q and contiguous.

    Returns:
        out; rows of requests that were not chosen are left alone.

    Determinism:
        As `attention_tiled`, bit for bit.
    """
    box = [128, 1, triton.next_power_of_2(q.shape[2])]
    k, v = (TensorDescriptor.from_tensor(t, box) for t in (key, value))
    _launch(q, k, v, rows, origins, scale, tile, chosen, out)
    return out


def _launch(
    q: torch.Tensor,
    k: torch.Tensor | TensorDescriptor,
    v: torch.Tensor | TensorDescriptor,
    rows: GpuPagedRows,
    tables: torch.Tensor,
    scale: float,
    tile: Tile,
    chosen: tuple[int, ...],
    out: torch.Tensor,
) -> None:
    height = tile.height or tile.rows
    G = q.shape[1] // k.shape[1]
    single = tile.packed and all(rows.queries[r] == 1 for r in chosen)
    if single:
        items = len(chosen) * -(-G // height)
        _launch_items(q, k, v, rows, tables, scale, tile, rows.requests(chosen), None, items, out)
    else:
        tiles = rows.tiles(chosen, G if tile.packed else 1, height)
        _launch_items(q, k, v, rows, tables, scale, tile, None, tiles, tiles.shape[1], out)


def _launch_items(
    q: torch.Tensor,
    k: torch.Tensor | TensorDescriptor,
    v: torch.Tensor | TensorDescriptor,
    rows: PagedRows,
    tables: torch.Tensor,
    scale: float,
    tile: Tile,
    requests: torch.Tensor | None,
    tiles: torch.Tensor | None,
    items: int,
    out: torch.Tensor,
) -> None:
    """Tiles from a list, or those of requests with one query."""
    if not items:
        return
    H, D = q.shape[1:]
    paged = isinstance(k, torch.Tensor)
    G = H // k.shape[1]
    height = tile.height or tile.rows
    single = tiles is None
    meet = not single and height > (G if tile.packed else 1)
    _attention_kernel[(H // G if tile.packed else H, items)](
        q, k, v, out, rows.query_starts, rows.context_lengths, tables, requests, tiles,
        exponent_scale(scale), q.stride(0), q.stride(1), out.stride(0), tables.stride(0) if paged else 0,
        items,
        block_stride=k.stride(0) if paged else 0, G=G, D=D, WIDTH=triton.next_power_of_2(D), ROWS=tile.rows,
        HEIGHT=height, PACKED=tile.packed,
        LISTED=not single, SINGLE=single, MEET=meet, PAGED=paged,
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages, **early(),
    )  # fmt: skip


def attention_row(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
    """The canonical member: the heads of one group at one query, by one warp of sixteen rows.

    Args: see `attention_tiled`.
    """
    G = q.shape[1] // cache.k.shape[1]
    tile = Tile(16, 1, 2, packed=G <= 16, height=G if G <= 16 else 1)
    return attention_tiled(q, cache, rows, scale, tile=tile)
