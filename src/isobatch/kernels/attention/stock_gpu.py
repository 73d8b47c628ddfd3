"""Attention over paged keys and values as PyTorch has it on a GPU: see docs/adr/0021-stock-on-the-gpu.md.

Single queries: FlexAttention's decoding kernel, whose block mask is the block table. It reads pages where
they lie, splits the keys of few requests among programs, and takes lengths and tables from the device, so
that a recording serves every step. Chunks: FlashAttention over keys gathered from their pages, all requests
in one call; long fresh prompts one by one, by the fastest of scaled_dot_product_attention.

Shape letters: R requests, T query rows, H heads, Hkv key/value heads, D head size, B pages of a block table.
"""

from __future__ import annotations

import functools
from itertools import accumulate, chain
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from isobatch.kernels.attention import stock
from isobatch.kernels.attention.gpu_rows import GpuPagedRows
from isobatch.kernels.gpu.compiled import compiled
from isobatch.kernels.gpu.device import INTERPRETED, capturing
from isobatch.kernels.stock import DenseCache

# From this many queries on a fresh prompt fills the GPU by itself.
_ALONE = 512
_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
# What torch 2.11 means to choose on Hopper; a slip in its table makes it one, which waits for each load.
_STAGES = {"num_stages": 3}
# Queries of a block of the mask: any number that a kernel's tile divides.
_QUERIES = 128
_LEAST_PAGES = 128


def attention(q: torch.Tensor, cache: DenseCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
    """Causal attention of every query over its request's pages.

    Args:
        q: [T, H, D], on the device, D contiguous.
        cache: the layer's cache, with this step's own keys and values already written.
        rows: whose queries these are.
        scale: of the scores.

    Returns:
        [T, H, D]. A padded request's row is zero on a GPU, and no number under the interpreter.
    """
    if INTERPRETED:  # torch has neither kernel on a CPU
        return stock.attention(q, cache, rows, scale)
    if len(rows.decodes) == len(rows.queries):
        return _decode(q, cache, rows, scale)
    alone = [r for r in rows.chunks if rows.queries[r] == rows.contexts[r] >= _ALONE]
    together = tuple(r for r in rows.chunks if r not in alone)
    if len(together) == len(rows.queries):
        return _ragged(q, cache, rows, together, scale)
    out = torch.empty_like(q)
    if rows.decodes:
        at = _rows_of(rows, rows.decodes)
        out[at] = _decode(q[at], cache, rows, scale)
    for r in alone:
        own = slice(rows.begins[r], rows.begins[r] + rows.queries[r])
        out[own] = _fresh(q[own], *gathered(cache, rows, (r,)), scale)
    if together:
        at = _rows_of(rows, together)
        out[at] = _ragged(q[at], cache, rows, together, scale)
    return out


def block_mask(cache: DenseCache, rows: GpuPagedRows) -> BlockMask:
    """Which pages each request's single query reads, and how many tokens of the last one.

    The number of requests is filled up to a power of two with such as have no keys, and the width of the
    block tables likewise, so that few sizes come to be compiled.
    """
    page = cache.k.shape[1]
    lengths, tables = rows.context_lengths, rows.block_tables
    if len(rows.decodes) < len(rows.queries):
        chosen = rows.upload(rows.decodes).long()
        lengths, tables = lengths[chosen], tables[chosen]
    spare = filled(len(lengths)) - len(lengths)
    wider = max(filled(tables.shape[1]), _LEAST_PAGES) - tables.shape[1]
    lengths = torch.nn.functional.pad(lengths, (0, spare))
    tables = torch.nn.functional.pad(tables, (0, wider, 0, spare))
    pages = (lengths + page - 1) // page
    last = tables.gather(1, (pages - 1).clamp(min=0).long()[:, None])[:, 0]
    left = lengths - (pages - 1) * page

    def mask(b: torch.Tensor, _h: torch.Tensor, _q: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key // page != last[b]) | (key % page < left[b])

    # All blocks are given as partial ones: only of those is the split over programs made by their number.
    return BlockMask(
        seq_lengths=(1, cache.k.shape[0] * page),
        kv_num_blocks=pages[:, None, None],
        kv_indices=tables[:, None, None],
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=None,
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(_QUERIES, page),
        mask_mod=mask,
    )


def filled(count: int) -> int:
    """The power of two that holds a count."""
    return 1 << (count - 1).bit_length()


def gathered(
    cache: DenseCache, rows: GpuPagedRows, chosen: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some requests, copied out of their pages, one request after another."""
    page = cache.k.shape[1]

    def make() -> torch.Tensor:
        lengths = [rows.contexts[r] for r in chosen]
        ends = list(accumulate(lengths))
        firsts = rows.upload([chosen, [0, *ends[:-1]]]).long()
        times = rows.upload(lengths).long()
        requests, starts = firsts.repeat_interleave(times, 1, output_size=ends[-1])
        place = torch.arange(ends[-1], device=requests.device) - starts
        slots: torch.Tensor = rows.block_tables[requests, place // page].long() * page + place % page
        return slots

    slots = rows.once(("slots", chosen), make)
    return cache.k.flatten(0, 1)[slots], cache.v.flatten(0, 1)[slots]


@functools.cache
def _flex() -> Any:
    return compiled(flex_attention, each_size=True)


def _decode(q: torch.Tensor, cache: DenseCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
    # In a recording it is made once more, inside it: what was made outside would stay as it was.
    mask = rows.once(("mask", capturing()), lambda: block_mask(cache, rows))
    if spare := filled(len(q)) - len(q):
        padded = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, spare))
    else:
        padded = q
    k, v = (pages.flatten(0, 1).transpose(0, 1)[None] for pages in (cache.k, cache.v))
    out: torch.Tensor = _flex()(
        padded[:, :, None], k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=_STAGES
    )
    return out[: len(q), :, 0]


def _fresh(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """A prompt with as many keys as queries."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    with sdpa_kernel(_BACKENDS, set_priority=True):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
    return out[0].transpose(0, 1)


def _ragged(
    q: torch.Tensor, cache: DenseCache, rows: GpuPagedRows, chosen: tuple[int, ...], scale: float
) -> torch.Tensor:
    """Chunks of any lengths, in one call of FlashAttention, which aligns the mask with the last key."""
    queries, contexts = ([many[r] for r in chosen] for many in (rows.queries, rows.contexts))
    q_starts, k_starts = rows.once(
        ("starts", chosen), lambda: rows.upload([[0, *accumulate(many)] for many in (queries, contexts)])
    )
    k, v = gathered(cache, rows, chosen)
    # What torch.nn.attention.varlen.varlen_attn calls, whose own arguments differ between versions.
    result: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, q_starts, k_starts, max(queries), max(contexts), 0.0, True, False, scale=scale
    )[0]
    return result


def _rows_of(rows: GpuPagedRows, chosen: tuple[int, ...]) -> torch.Tensor:
    """Where the queries of some requests are."""
    spans = (range(rows.begins[r], rows.begins[r] + rows.queries[r]) for r in chosen)
    return rows.once(("rows", chosen), lambda: rows.upload([*chain.from_iterable(spans)]).long())
