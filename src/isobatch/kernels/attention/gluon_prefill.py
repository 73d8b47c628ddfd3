"""Prefill on Hopper: two groups of four warps that sum, two warps that feed them; the order of `triton.py`.

What bounds a prompt is that the tensor core waits for exponentials, and those for the tensor core. So a group
begins the next block's scores and this block's product with the values at once, and takes the next block's
weights while they run; and while one group has weights to take, the other's products fill the tensor core.
Both read the same keys and values, each for 64 queries of one head. Weights go to the tensor core as they lie
in registers.

Programs walk through tiles, the longest first, and are dealt them as one deals cards to and fro, so that all
end at about the same time. Keys and values must lie in one piece per request: as the step has them if it has
all of them, or else gathered from their pages.

A value that is NaN or infinite spoils rows that do not see it, since a weight of zero is no help against it.
Tiles whose result is not finite say so, and `triton_again.py` computes them again, with care.

Triton's interpreter does not know Gluon: `triton.py` serves on the CPU. Tests run this text, too.

Shape letters: T query rows, H heads, Hkv key/value heads, G = H / Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from isobatch.kernels.attention.gather import gather, places
from isobatch.kernels.attention.gluon_steps import barrier, bulk_copy, bulk_store, rows_of
from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows, cut
from isobatch.kernels.attention.launch import exponent_scale
from isobatch.kernels.attention.triton_again import attention_again
from isobatch.kernels.attention.triton_steps import SPAN, lane_sums, row_total
from isobatch.kernels.gpu.device import multiprocessors
from isobatch.kernels.gpu.overlap import early
from isobatch.kernels.gpu.ptx import ex2, fma, mul, rescale, sub
from isobatch.kernels.layout import StepKeys

_ROWS = 128  # of a tile: queries of one head
_HALF = gl.constexpr(64)  # of a group of warps
_KEYS = 3  # blocks that there is room for: a block's keys are wanted a step before its values
_VALUES = 2


@gluon.jit
def _rounds(items):
    """How many tiles this program is dealt."""
    step, me, dealt = gl.num_programs(0), gl.program_id(0), items // gl.num_programs(0)
    place = gl.where(dealt % 2 == 0, me, step - 1 - me)
    return dealt + (place < items - dealt * step).to(gl.int32)


@gluon.jit
def _tile(table, count, heads, items, turn):
    """(item, head, first row, rows, position of the first row, row of the request's first key)."""
    step, me = gl.num_programs(0), gl.program_id(0)
    item = gl.minimum(turn * step + gl.where(turn % 2 == 0, me, step - 1 - me), items - 1)
    at = table + item // heads
    row, rows = gl.load(at), gl.load(at + count)
    return item, item % heads, row, rows, gl.load(at + 2 * count), gl.load(at + 3 * count)


@gluon.jit
def _produce_keys(
    q, k, queries, keys, queries_ready, queries_free, ready, free, table, count, heads, group, items,
    head_rows, head_columns, D: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    block = 0
    for turn in range(_rounds(items)):
        _, head, row, rows, position, origin = _tile(table, count, heads, items, turn)
        which = turn % 2
        mbarrier.wait(queries_free.index(which), (turn // 2 + 1) & 1)
        mbarrier.expect(queries_ready.index(which), q.block_type.nbytes * 2)
        for half in gl.static_range(2):
            at = [row + half * _HALF, head * D]
            bulk_copy(q, at, queries_ready.index(which), queries.index(which * 2 + half))
        row, column = origin + head // group * head_rows, head // group * head_columns
        for n in range(gl.cdiv(position + rows, SPAN)):
            s = block % KEYS
            mbarrier.wait(free.index(s), (block // KEYS + 1) & 1)
            mbarrier.expect(ready.index(s), k.block_type.nbytes)
            bulk_copy(k, [row + n * SPAN, column], ready.index(s), keys.index(s))
            block += 1


@gluon.jit
def _produce_values(
    v, values, ready, free, table, count, heads, group, items, head_rows, head_columns,
    KEYS: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    block = 0
    for turn in range(_rounds(items)):
        _, head, _, rows, position, origin = _tile(table, count, heads, items, turn)
        row, column = origin + head // group * head_rows, head // group * head_columns
        for n in range(gl.cdiv(position + rows, SPAN)):
            # The block before the last one's place: a block's keys and values are given back together.
            mbarrier.wait(free.index((block + 1) % KEYS), ((block + 1) // KEYS + 1) & 1)
            s = block % VALUES
            mbarrier.expect(ready.index(s), v.block_type.nbytes)
            bulk_copy(v, [row + n * SPAN, column], ready.index(s), values.index(s))
            block += 1


@gluon.jit
def _weights(s, m, lanes, c, n, position, MASK: gl.constexpr, scores: gl.constexpr, by_lane: gl.constexpr):
    """`softmax_block` of block n's scores."""
    x = mul(s, gl.full([_HALF, SPAN], 0.0, gl.float32, layout=scores) + c)
    if MASK:
        j = n * SPAN + gl.arange(0, SPAN, layout=gl.SliceLayout(0, scores))
        x = gl.where(j[None, :] <= position[:, None], x, float("-inf"))
    top = gl.maximum(m, gl.max(x, 1))
    p = ex2(sub(x, top[:, None]))
    alpha = ex2(sub(m, top))
    b = gl.convert_layout(alpha, gl.SliceLayout(1, by_lane))
    t = gl.convert_layout(lane_sums(p, _HALF), by_lane)
    return p, alpha, top, fma(lanes, b[:, None], t)


@gluon.jit
def _advance(
    acc, p, alpha, m, lanes, feed, block, n, MASK: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr,
    scores: gl.constexpr, across: gl.constexpr, by_lane: gl.constexpr,
):  # fmt: skip
    """The product with values of block n, and beside it the weights of block n + 1."""
    query, keys, values, keys_ready, values_ready, free, long_past, phase, c, position = feed
    ks, vs = (block + 1) % KEYS, block % VALUES
    mbarrier.wait(keys_ready.index(ks), ((block + 1) // KEYS) & 1)
    blank = gl.zeros([_HALF, SPAN], gl.float32, layout=scores)
    coming = warpgroup_mma(query, keys.index(ks).permute((1, 0)), blank, use_acc=False, is_async=True)
    acc = rescale(acc, gl.convert_layout(alpha, gl.SliceLayout(1, across))[:, None], values.shape[2] // 2)
    mbarrier.wait(values_ready.index(vs), (block // VALUES) & 1)
    token = warpgroup_mma(p, values.index(vs), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[coming])
    fresh, alpha, m, lanes = _weights(s, m, lanes, c, n + 1, position, MASK, scores, by_lane)
    fresh = gl.convert_layout(fresh.to(p.dtype), gl.DotOperandLayout(0, across, 2))
    # What has long come is waited for once more: the assembler would move the weights behind the next line,
    # where nothing runs beside them, and a branch is what it moves nothing across.
    mbarrier.wait(long_past, phase)
    acc, p, fresh, lanes = warpgroup_mma_wait(0, deps=[token, p, fresh, lanes])
    barrier()
    mbarrier.arrive(free.index(block % KEYS))
    return acc, fresh, alpha, m, lanes


@gluon.jit
def _consume(feed, D: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr, WHICH: gl.constexpr):
    (
        queries, keys, values, queries_ready, queries_free, keys_ready, values_ready, free, out, out_row,
        whole_out, spoilt, table, count, heads, items, c,
    ) = feed  # fmt: skip
    scores: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SPAN, 16]
    )
    across: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    operand: gl.constexpr = gl.DotOperandLayout(0, across, 2)
    # A thread has a lane of those rows whose weights of that lane it has.
    by_lane: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
    r = gl.arange(0, _HALF, layout=gl.SliceLayout(1, scores))
    i = gl.arange(0, _HALF, layout=gl.SliceLayout(1, across))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, across))
    block = 0
    item, head, row, rows, start, _ = _tile(table, count, heads, items, 0)
    for turn in range(_rounds(items)):
        which = turn % 2
        # Asked for a tile before it is needed.
        next_item, next_head, next_row, next_rows, next_start, _ = _tile(table, count, heads, items, turn + 1)
        position = start + gl.minimum(WHICH * _HALF + r, rows - 1)
        blocks = gl.cdiv(start + rows, SPAN)
        whole = gl.minimum((start + WHICH * _HALF + 1) // SPAN, blocks)
        m = gl.full([_HALF], float("-inf"), gl.float32, layout=gl.SliceLayout(1, scores))
        lanes = gl.zeros([_HALF, 4], gl.float32, layout=by_lane)
        acc = gl.zeros([_HALF, D], gl.float32, layout=across)
        query, come, phase = queries.index(which * 2 + WHICH), queries_ready.index(which), (turn // 2) & 1
        steps = (query, keys, values, keys_ready, values_ready, free, come, phase, c, position)
        mbarrier.wait(come, phase)
        s = block % KEYS
        mbarrier.wait(keys_ready.index(s), (block // KEYS) & 1)
        blank = gl.zeros([_HALF, SPAN], gl.float32, layout=scores)
        first = warpgroup_mma(query, keys.index(s).permute((1, 0)), blank, use_acc=False, is_async=True)
        x = warpgroup_mma_wait(0, deps=[first])
        p, alpha, m, lanes = _weights(x, m, lanes, c, 0, position, True, scores, by_lane)
        p = gl.convert_layout(p.to(values.dtype), operand)
        for n in range(whole - 1):
            acc, p, alpha, m, lanes = _advance(
                acc, p, alpha, m, lanes, steps, block, n, False, KEYS, VALUES, scores, across, by_lane
            )
            block += 1
        for n in range(gl.maximum(whole - 1, 0), blocks - 1):
            acc, p, alpha, m, lanes = _advance(
                acc, p, alpha, m, lanes, steps, block, n, True, KEYS, VALUES, scores, across, by_lane
            )
            block += 1
        s = block % VALUES
        mbarrier.wait(values_ready.index(s), (block // VALUES) & 1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, across))[:, None]
        token = warpgroup_mma(p, values.index(s), acc, is_async=True)
        total = gl.convert_layout(row_total(lanes, _HALF), gl.SliceLayout(1, across))
        acc, p = warpgroup_mma_wait(0, deps=[token, p])
        barrier()
        mbarrier.arrive(free.index(block % KEYS))
        block += 1
        inside = WHICH * _HALF + i < rows
        bare = gl.min((gl.abs(acc) < float("inf")).to(gl.int32), 1) == 1
        gl.store(spoilt + item * (2 * _HALF) + WHICH * _HALF + i, (inside & (~bare)).to(gl.int8))
        result = (acc / total[:, None]).to(values.dtype)
        if rows >= WHICH * _HALF + _HALF:
            # Nobody needs the queries any more; their place is the results'.
            query.store(result)
            fence_async_shared()
            barrier()
            bulk_store(whole_out, [row + WHICH * _HALF, head * D], query)
            tma.store_wait(0)
        else:
            at = out + (row + WHICH * _HALF + i).to(gl.int64)[:, None] * out_row + head * D + d[None, :]
            gl.store(at, result, mask=inside[:, None])
        barrier()
        mbarrier.arrive(queries_free.index(which))
        item, head, row, rows, start = next_item, next_head, next_row, next_rows, next_start
    gdc_launch_dependents()


@gluon.jit(do_not_specialize=["count", "items", "head_rows"])
def _prefill_kernel(
    q, k, v, whole_out, out, spoilt, table, c, count, heads, group, items, out_row, head_rows, head_columns,
    D: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    """Axis: the place at the table where tiles are dealt."""
    queries = gl.allocate_shared_memory(q.dtype, [4, _HALF, D], q.layout)
    keys = gl.allocate_shared_memory(q.dtype, [KEYS, SPAN, D], k.layout)
    values = gl.allocate_shared_memory(q.dtype, [VALUES, SPAN, D], v.layout)
    queries_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    queries_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    keys_ready = gl.allocate_shared_memory(gl.int64, [KEYS, 1], mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [VALUES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [KEYS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2):
        mbarrier.init(queries_ready.index(s), count=1)
        mbarrier.init(queries_free.index(s), count=2)
    for s in gl.static_range(KEYS):
        mbarrier.init(keys_ready.index(s), count=1)
        mbarrier.init(free.index(s), count=2)
    for s in gl.static_range(VALUES):
        mbarrier.init(values_ready.index(s), count=1)
    fence_async_shared()
    gdc_wait()
    feed = (
        queries, keys, values, queries_ready, queries_free, keys_ready, values_ready, free, out, out_row,
        whole_out, spoilt, table, count, heads, items, c,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (feed, D, KEYS, VALUES, 0)),
            (_consume, (feed, D, KEYS, VALUES, 1)),
            (
                _produce_keys,
                (
                    q, k, queries, keys, queries_ready, queries_free, keys_ready, free, table, count, heads,
                    group, items, head_rows, head_columns, D, KEYS,
                ),
            ),
            (
                _produce_values,
                (
                    v, values, values_ready, free, table, count, heads, group, items, head_rows,
                    head_columns, KEYS, VALUES,
                ),
            ),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip


def _boxes(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """For the bulk copy engine: so many rows of a head of [N, heads, D], heads side by side or one by one."""
    if tensor.stride(1) == tensor.shape[2]:
        return rows_of(tensor.view(len(tensor), -1), rows, tensor.shape[2])
    return rows_of(tensor.transpose(0, 1), rows, tensor.shape[2])


def attention_fed(
    q: torch.Tensor,
    cache: GpuKVCache,
    rows: GpuPagedRows,
    scale: float,
    *,
    chosen: tuple[int, ...],
    own: StepKeys | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Attention of chunks, heads of 64 or 128 numbers.

    Args:
        q: bf16 or fp16 [T, H, D], on the device, D contiguous.
        cache: of the layer, with the step's own keys and values.
        rows: whose queries these are, and whose `contexts` are exact for the chosen requests.
        scale: of the scores, positive.
        chosen: the requests to serve.
        own: the step's own keys and values, heads side by side: those of fresh prompts are read here.
        out: where to write, like q and contiguous.

    Returns:
        out; rows of requests that were not chosen are left alone.

    Determinism:
        As the members of `triton.py`, bit for bit.
    """
    later = chosen
    if own is not None:
        fresh, later = rows.once(("fresh", chosen), lambda: _fresh_first(rows, chosen))
        if fresh:
            _launch(q, *own, rows.begins, cache, rows, scale, fresh, out)
    if later:
        key, value, _ = gather(cache, rows, later)
        _launch(q, key, value, places(rows, later)[0], cache, rows, scale, later, out)
    return out


def _fresh_first(rows: GpuPagedRows, chosen: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(those of which the step has all keys, the others)."""
    fresh = tuple(r for r in chosen if rows.queries[r] == rows.contexts[r])
    return fresh, tuple(r for r in chosen if rows.queries[r] != rows.contexts[r])


def _launch(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    firsts: Sequence[int],
    cache: GpuKVCache,
    rows: GpuPagedRows,
    scale: float,
    chosen: tuple[int, ...],
    out: torch.Tensor,
) -> None:
    """Keys and values are [N, Hkv, D]; row firsts[r] has request r's position 0."""
    H, D = q.shape[1:]
    apart = key.stride(1) != D
    q = q if q.stride(1) == D else q.contiguous()

    def tiles() -> torch.Tensor:
        requests, starts = cut(rows.queries, rows.contexts, chosen, 1, _ROWS)
        pairs = list(zip(requests, starts, strict=True))
        return rows.upload(
            [
                [rows.begins[r] + first for r, first in pairs],
                [min(_ROWS, rows.queries[r] - first) for r, first in pairs],
                [rows.contexts[r] - rows.queries[r] + first for r, first in pairs],
                [firsts[r] for r, _ in pairs],
                requests,
                starts,
            ]
        )

    table = rows.once(("fed", chosen, apart), tiles)
    count, half = table.shape[1], _HALF.value
    spoilt = torch.empty(count, H, _ROWS, dtype=torch.int8, device=q.device)
    _prefill_kernel[(min(count * H, multiprocessors()),)](
        _boxes(q, half), _boxes(key, _ROWS), _boxes(value, _ROWS), _boxes(out, half), out, spoilt, table,
        exponent_scale(scale), count, H, H // key.shape[1], count * H, out.stride(0),
        len(key) if apart else 0, 0 if apart else D,
        D=D, KEYS=_KEYS, VALUES=_VALUES, num_warps=4, **early(),
    )  # fmt: skip
    attention_again(q, cache, rows, scale, table[4:], spoilt, out=out)
