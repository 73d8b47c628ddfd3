"""Paged attention on the CPU, float32.

Written order, for a query at position p, a function of p and the keys and values 0..p alone:
- Keys from position 0 in spans of 128, ascending. s_j = fma chain over d ascending, from zero.
- m' = max(m, max s_j). p_j = exp2((s_j - m') * c) with c = float32(log2(e) * scale); a = exp2((m - m') * c).
- Sixteen row-sum lanes: L_t = L_t * a, then L_t += p_j over the j of the span with j mod 16 == t, ascending.
- acc = acc * a, then acc = fma(p_j, v_j, acc) over the span, j ascending.
- l = lanes folded in halves (t with t + 8, + 4, + 2, + 1); out = acc / l.

Prefill packs queries of one head into a register tile, decode packs the heads that share a KV head. Rows of a
tile never meet in a sum, so both are members of one class.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from isobatch.kernels.attention.cache import KVCache
from isobatch.kernels.cpu.elementary import LOG2_E64, exp2
from isobatch.kernels.cpu.jit import array, device, empty, kernel
from isobatch.kernels.cpu.tile import MAX_ROWS, multiply_page, multiply_page_resume, prefetch
from isobatch.kernels.layout import PAGE, PagedRows

SPAN = 128
_MINUS_INFINITY = np.float32(-np.inf)


@device
def _softmax_span(s, n, m, lanes, acc, c):
    """Turns n scores into weights in place, rescales what came before, returns the new maximum."""
    padded = (n + PAGE - 1) // PAGE * PAGE
    for j in range(n, padded):
        s[j] = _MINUS_INFINITY  # weight +0, which changes no lane
    tops = np.full(PAGE, m, np.float32)
    for j in range(0, padded, PAGE):
        for t in range(PAGE):
            tops[t] = s[j + t] if s[j + t] > tops[t] else tops[t]
    top = m
    for t in range(PAGE):
        top = tops[t] if tops[t] > top else top
    for j in range(padded):
        s[j] = exp2((s[j] - top) * c)
    scale = exp2((m - top) * c)
    for t in range(PAGE):
        lanes[t] = lanes[t] * scale
    for j in range(0, padded, PAGE):
        for t in range(PAGE):
            lanes[t] = lanes[t] + s[j + t]
    for d in range(acc.shape[0]):
        acc[d] = acc[d] * scale
    return top


@device
def _fetch_page(pages, table, index, kv_head):
    page = pages[table[index], kv_head]
    prefetch(page.ctypes.data, page.size * 4)


@device
def _attend(q, q_stride, rows, first_keys, keys_step, k, v, table, kv_head, c, out):
    """Attends `rows` query rows that share a KV head; row r sees first_keys + r * keys_step keys.

    q is an address and q_stride in floats; out is [rows, D], any strides. What lies beyond a row's own keys,
    a later token or a stale block, be it NaN, stays outside: a page's further scores are computed and
    replaced, its further values never read.
    """
    D = k.shape[2]
    scores = np.empty((rows, SPAN), np.float32)
    acc = np.zeros((rows, D), np.float32)
    lanes = np.zeros((rows, PAGE), np.float32)
    m = np.full(rows, _MINUS_INFINITY, np.float32)
    last_keys = first_keys + (rows - 1) * keys_step
    for start in range(0, last_keys, SPAN):
        first = max(0, start - first_keys + 1) if keys_step else 0
        active = rows - first
        p = scores.ctypes.data + 4 * first * SPAN
        for j in range(0, min(SPAN, last_keys - start), PAGE):
            if (
                not keys_step
            ):  # a decode step reads each page once, and waits for memory if it does not ask ahead
                _fetch_page(v, table, (start + j) // PAGE, kv_head)
                if start + j + PAGE < last_keys:
                    _fetch_page(k, table, (start + j) // PAGE + 1, kv_head)
            page = k[table[(start + j) // PAGE], kv_head].ctypes.data
            multiply_page(active, q + 4 * first * q_stride, q_stride, page, PAGE, D, p + 4 * j, SPAN)
        for r in range(first, rows):
            n = min(SPAN, first_keys + r * keys_step - start)
            m[r] = _softmax_span(scores[r], n, m[r], lanes[r], acc[r], c)
        common = min(SPAN, first_keys + first * keys_step - start)
        for j in range(0, common, PAGE):
            page = v[table[(start + j) // PAGE], kv_head].ctypes.data
            count = min(PAGE, common - j)
            for d in range(0, D, PAGE):
                into = acc.ctypes.data + 4 * (first * D + d)
                multiply_page_resume(active, p + 4 * j, SPAN, page + 4 * d, D, count, into, D)
        # The triangle: each further row goes on alone over the keys that its predecessors do not see.
        for r in range(first + 1, rows):
            n = min(SPAN, first_keys + r * keys_step - start)
            j = common
            while j < n:
                offset = j % PAGE
                count = min(PAGE - offset, n - j)
                page = v[table[(start + j) // PAGE], kv_head, offset].ctypes.data
                for d in range(0, D, PAGE):
                    into = acc.ctypes.data + 4 * (r * D + d)
                    weights = scores.ctypes.data + 4 * (r * SPAN + j)
                    multiply_page_resume(1, weights, 0, page + 4 * d, D, count, into, 0)
                j += count
    for r in range(rows):
        width = PAGE // 2
        while width:
            for t in range(width):
                lanes[r, t] = lanes[r, t] + lanes[r, t + width]
            width //= 2
        for d in range(D):
            out[r, d] = acc[r, d] / lanes[r, 0]


@kernel
def _attention(q, k, v, query_starts, context_lengths, block_tables, c, tile, pack_heads, out):
    H, kv_heads = q.shape[1], k.shape[1]
    group = H // kv_heads
    R = context_lengths.shape[0]
    ends = np.empty(R + 1, np.int64)  # work items of the requests before
    ends[0] = 0
    for r in range(R):
        queries = query_starts[r + 1] - query_starts[r]
        packed = pack_heads and queries == 1
        ends[r + 1] = ends[r] + (kv_heads if packed else H * ((queries + tile - 1) // tile))
    for item in prange(ends[R]):
        r = np.searchsorted(ends, item, side="right") - 1
        begin, queries = query_starts[r], query_starts[r + 1] - query_starts[r]
        table = block_tables[r]
        local = item - ends[r]
        if pack_heads and queries == 1:
            rows = q[begin, local * group : (local + 1) * group]
            result = out[begin, local * group : (local + 1) * group]
            _attend(
                rows.ctypes.data,
                rows.strides[0] // 4,
                group,
                context_lengths[r],
                0,
                k,
                v,
                table,
                local,
                c,
                result,
            )
        else:
            tiles = (queries + tile - 1) // tile
            h, first = local // tiles, local % tiles * tile
            count = min(tile, queries - first)
            rows = q[begin + first : begin + first + count, h]
            result = out[begin + first : begin + first + count, h]
            keys = context_lengths[r] - queries + first + 1
            _attend(
                rows.ctypes.data, rows.strides[0] // 4, count, keys, 1, k, v, table, h // group, c, result
            )


def _launch(q: torch.Tensor, cache: KVCache, rows: PagedRows, scale: float, tile: int, pack_heads: bool):
    out, out_array = empty(*q.shape)
    c = np.float32(LOG2_E64 * scale)
    _attention(
        array(q),
        cache.k.numpy(),
        cache.v.numpy(),
        array(rows.query_starts),
        array(rows.context_lengths),
        array(rows.block_tables),
        c,
        tile,
        pack_heads,
        out_array,
    )
    return out


def attention_packed(q: torch.Tensor, cache: KVCache, rows: PagedRows, scale: float) -> torch.Tensor:
    """The fast member: prefill packs queries of a head, decode packs the heads of a group."""
    return _launch(q, cache, rows, scale, MAX_ROWS, True)


def attention_queries(q: torch.Tensor, cache: KVCache, rows: PagedRows, scale: float) -> torch.Tensor:
    """A member that packs five queries of a head, whatever their number."""
    return _launch(q, cache, rows, scale, 5, False)


def attention_row(q: torch.Tensor, cache: KVCache, rows: PagedRows, scale: float) -> torch.Tensor:
    """The canonical member: one query of one head at a time."""
    return _launch(q, cache, rows, scale, 1, False)


@kernel
def _write_kv(key, value, slots, k, v):
    T, kv_heads, D = key.shape
    for t in prange(T):
        block, offset = slots[t] // PAGE, slots[t] % PAGE
        for h in range(kv_heads):
            for d in range(D):
                k[block, h, d, offset] = key[t, h, d]
                v[block, h, offset, d] = value[t, h, d]


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: KVCache, rows: PagedRows) -> None:
    """Stores each row's key and value in its slot. A copy, no arithmetic."""
    launch = _write_kv.sized(key.numel())
    launch(array(key), array(value), array(rows.slots), cache.k.numpy(), cache.v.numpy())
