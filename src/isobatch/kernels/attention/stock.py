"""Attention as a server on torch's own kernels runs it, and in float64 for reference.

Decode rows are gathered from the pages into one padded batch under a mask; a prompt's chunk goes alone, with
its prefix. Both through torch.nn.functional.scaled_dot_product_attention, which splits its sums as it likes.
"""

from __future__ import annotations

import torch

from isobatch.kernels.layout import PagedRows
from isobatch.kernels.stock import DenseCache


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: DenseCache, rows: PagedRows) -> None:
    """Stores each row's key and value in its slot."""
    cache.k.view(-1, *key.shape[1:])[rows.slots] = key
    cache.v.view(-1, *value.shape[1:])[rows.slots] = value


def attention(q: torch.Tensor, cache: DenseCache, rows: PagedRows, scale: float) -> torch.Tensor:
    """Causal attention of every query over its request's pages."""
    starts, lengths = rows.query_starts.tolist(), rows.context_lengths.tolist()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decodes = [r for r in range(len(lengths)) if starts[r + 1] - starts[r] == 1]
    if decodes:
        at = torch.tensor([starts[r] for r in decodes], device=q.device)
        out[at] = _decode(q[at], cache, rows, torch.tensor(decodes, device=q.device), scale)
    for r in range(len(lengths)):
        begin, end = starts[r], starts[r + 1]
        if end - begin > 1:
            k, v = (_gather(pages, rows.block_tables[r : r + 1], lengths[r]) for pages in (cache.k, cache.v))
            first = lengths[r] - (end - begin)
            mask = None
            if first:
                at = torch.arange(lengths[r], device=q.device)
                mask = at <= at[first:, None]
            heads = q[None, begin:end].transpose(1, 2)
            out[begin:end] = _sdpa(heads, k, v, mask, scale)[0].transpose(0, 1)
    return out


def attention_ref(q: torch.Tensor, cache: DenseCache, rows: PagedRows, scale: float) -> torch.Tensor:
    """The same in float64."""
    return attention(q.double(), DenseCache(cache.k.double(), cache.v.double()), rows, scale)


def _decode(
    q: torch.Tensor, cache: DenseCache, rows: PagedRows, which: torch.Tensor, scale: float
) -> torch.Tensor:
    lengths = rows.context_lengths[which]
    longest = max(1, int(lengths.max()))  # rows of a recording may all be padded
    k, v = (_gather(pages, rows.block_tables[which], longest) for pages in (cache.k, cache.v))
    mask = (torch.arange(longest, device=q.device) < lengths[:, None])[:, None, None]
    return _sdpa(q[:, :, None], k, v, mask, scale)[:, :, 0]


def _gather(pages: torch.Tensor, tables: torch.Tensor, length: int) -> torch.Tensor:
    """Keys or values [R, Hkv, length, D] of the requests whose block tables are given."""
    chosen = pages[tables[:, : -(-length // pages.shape[1])].long()]
    return chosen.flatten(1, 2)[:, :length].transpose(1, 2)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    causal = mask is None
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )
