"""Paged attention against torch's scaled_dot_product_attention, by the fastest backend that runs, and against
FlashAttention 3 where it is to be had.

The other sides get each request's keys and values in one piece, without pages, and all requests of one
length: the best case for them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from isobatch.bits import bits_equal
from isobatch.cli.drawn import drawn
from isobatch.cli.flash3 import flash_attention_3
from isobatch.cli.goals import Goal, Point, at_least, at_most, geometric_mean
from isobatch.errors import IntegrityError, UnsupportedOpError
from isobatch.kernels.attention.gpu_record import attention_for, side_by_side
from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.attention.gpu_serve import Attention
from isobatch.kernels.gpu.device import dtypes
from isobatch.kernels.gpu.timing import Work, microseconds
from isobatch.kernels.layout import PAGE, StepKeys
from isobatch.models.presets import preset

_MODEL = "qwen3-8b"
_DECODES = tuple(
    (requests, context)
    for requests in (1, 8, 32, 128, 1024)
    for context in (128, 1024, 8192, 32_768, 131_072)
    if requests * context <= 1 << 21
)
_PREFILLS = (1024, 4096, 16_384, 32_768)
_CHUNK = (2048, 32_768)  # queries, and keys their own included
_FLASH3 = "flash_attention_3"
_COLD_BYTES = 200 << 20
_LARGE_BYTES = 64 << 20
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class _Requests:
    """Requests of one shape: caches with shuffled pages, and the same keys and values in one piece.

    Args:
        heads: H, Hkv and D.
        requests: how many.
        queries: of each, its last positions.
        context: keys of each.
        copies: of it all, so that each call finds its own in device memory.
    """

    def __init__(
        self, heads: tuple[int, int, int], requests: int, queries: int, context: int, copies: int
    ) -> None:
        H, kv_heads, D = heads
        pages = -(-context // PAGE)
        self.scale = 1 / math.sqrt(D)
        self.q = [drawn(f"q/{copy}", requests * queries, H, D) for copy in range(copies)]
        self.caches = [
            GpuKVCache(*(drawn(f"{side}/{copy}", requests * pages, kv_heads, PAGE, D) for side in "kv"))
            for copy in range(copies)
        ]
        order = random.Random(context).sample(range(requests * pages), requests * pages)
        self.tables = GpuPagedRows.upload(order).view(requests, pages)
        self.rows = self._rows(requests, queries, context)
        fresh = requests == 1 and queries == context
        self.steps = [self._step(copy) if fresh else (self.q[copy], None) for copy in range(copies)]
        self._shape = requests, queries, context

    def _rows(self, requests: int, queries: int, context: int) -> GpuPagedRows:
        starts = GpuPagedRows.upload([r * queries for r in range(requests + 1)])
        lengths = GpuPagedRows.upload([context] * requests)
        ints = (queries,) * requests, (context,) * requests
        return GpuPagedRows(starts, lengths, self.tables[:requests], starts.long(), *ints, settled=True)

    def _step(self, copy: int) -> tuple[torch.Tensor, StepKeys]:
        """A fresh prompt's queries, keys and values as the engine has them."""
        own, q = self.tables[0].long(), self.q[copy]
        k, v = (
            pages[own].transpose(1, 2).flatten(0, 1)[: len(q)]
            for pages in (self.caches[copy].k, self.caches[copy].v)
        )
        return side_by_side(q, k, v)

    def ours(self, attention: Attention, copy: int) -> torch.Tensor:
        """Every request."""
        q, own = self.steps[copy]
        return attention(q, self.caches[copy], self.rows, self.scale, own)

    def alone(self, attention: Attention) -> torch.Tensor:
        """The first request, without the others."""
        _, queries, context = self._shape
        return attention(self.q[0][:queries], self.caches[0], self._rows(1, queries, context), self.scale)

    def others(self) -> tuple[dict[str, Work], dict[str, str]]:
        """What runs here of torch's backends and FlashAttention 3, by name; and why the rest does not."""
        requests, queries, context = self._shape
        pieces, repeated = [], []
        for q, cache in zip(self.q, self.caches, strict=True):
            k, v = (
                pages[self.tables.long()].transpose(1, 2).flatten(2, 3)[:, :, :context].contiguous()
                for pages in (cache.k, cache.v)
            )
            heads = q.view(requests, queries, *q.shape[1:]).transpose(1, 2)
            pieces.append((heads, k, v))
            if 1 < queries < context:  # torch's causal mask that ends with the keys knows no groups of heads
                k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
            repeated.append((heads, k, v))
        mask = causal_lower_right(queries, context) if 1 < queries < context else None

        def run(copy: int, backend: SDPBackend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    *repeated[copy],
                    attn_mask=mask,
                    is_causal=queries == context,
                    scale=self.scale,
                    enable_gqa=mask is None,
                )

        sides: dict[str, Work] = {
            backend.name.lower(): partial(run, backend=backend) for backend in _BACKENDS
        }
        flash3 = flash_attention_3()
        if flash3 is not None:
            rows = [[t.transpose(1, 2).contiguous() for t in piece] for piece in pieces]

            def run_flash3(copy: int) -> torch.Tensor:
                q, k, v = rows[copy]
                return flash3(q, k, v, self.scale)

            sides[_FLASH3] = run_flash3
        refused = {name: reason for name, side in sides.items() if (reason := _refusal(side)) is not None}
        return {name: side for name, side in sides.items() if name not in refused}, refused


def _refusal(work: Work) -> str | None:
    try:
        work(0)
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def attention_points(limits: dict[str, float], progress: Callable[[str], None]) -> Iterator[Point]:
    """Decode, fresh prompts, and a chunk after a long prefix.

    Args:
        limits: bytes_per_s and flop_per_s of the device.
        progress: told each shape.

    Raises:
        IntegrityError: a request alone differs from the request among others.
        UnsupportedOpError: torch has no backend here.
    """
    d = preset(_MODEL)
    heads = d.heads, d.kv_heads, d.head_size
    attention = attention_for(*heads, dtypes()[0])
    for requests, context in _DECODES:
        progress(f"decode, {requests} x {context}")
        yield _point("decode", heads, requests, 1, context, attention, limits)
    for length in _PREFILLS:
        progress(f"prefill, {length}")
        yield _point("prefill", heads, 1, length, length, attention, limits)
    progress("a chunk after a prefix")
    yield _point("chunk", heads, 1, *_CHUNK, attention, limits)


def _point(
    kind: str,
    heads: tuple[int, int, int],
    requests: int,
    queries: int,
    context: int,
    attention: Attention,
    limits: dict[str, float],
) -> Point:
    H, kv_heads, D = heads
    moved = requests * context * kv_heads * D * 2 * dtypes()[0].itemsize
    copies = max(1, min(16, _COLD_BYTES // moved))
    data = _Requests(heads, requests, queries, context, copies)
    if not bits_equal(data.ours(attention, 0)[:queries], data.alone(attention)):
        raise IntegrityError(f"{kind}, {requests} x {context}: a request alone differs")
    others, refused = data.others()
    ours, *times = microseconds([lambda copy: data.ours(attention, copy), *others.values()], copies)
    theirs = dict(zip(others, times, strict=True))
    torchs = [us for name, us in theirs.items() if name != _FLASH3]
    if not torchs:
        raise UnsupportedOpError("torch has no attention to compare with", got=f"{kind}, {context} keys")
    operations = 4 * requests * H * D * queries * (context - (queries - 1) / 2)
    floor = max(moved / limits["bytes_per_s"], operations / limits["flop_per_s"]) * 1e6
    return {
        "op": "attention",
        "kind": kind,
        "requests": requests,
        "queries": queries,
        "context": context,
        "isobatch_us": ours,
        "others_us": theirs,
        "others_refused": refused,
        "ratio": ours / min(theirs.values() if kind == "decode" else torchs),
        "ratio_flash3": ours / theirs[_FLASH3] if _FLASH3 in theirs else None,
        "floor_us": floor,
        "bandwidth_share": moved / limits["bytes_per_s"] / ours * 1e6,
        "kv_bytes": moved,
    }


def attention_summary(points: list[Point]) -> list[Goal]:
    """The goals, and whether they are met."""
    ratios = {
        kind: [p["ratio"] for p in points if p["kind"] == kind] for kind in ("decode", "prefill", "chunk")
    }
    flash3 = [p["ratio_flash3"] for p in points if p["kind"] == "prefill" and p["ratio_flash3"] is not None]
    large = [p for p in points if p["kind"] == "decode" and p["kv_bytes"] >= _LARGE_BYTES]
    shares = {
        many: [p["bandwidth_share"] for p in large if (p["requests"] >= 8) is many] for many in (True, False)
    }
    return [
        at_most("decode: worst point against the fastest other", max(ratios["decode"]), 1.0),
        at_most("decode: geometric mean against the fastest other", geometric_mean(ratios["decode"]), 1.0),
        *(at_least("decode: least share of bandwidth, 8 and more", min(s), 0.8) for s in [shares[True]] if s),
        *(at_least("decode: least share of bandwidth, fewer", min(s), 0.5) for s in [shares[False]] if s),
        at_most("prefill: worst point against torch's fastest", max(ratios["prefill"]), 1.0),
        *(at_most("prefill: worst point against FlashAttention 3", max(s), 1.1) for s in [flash3] if s),
        at_most("chunk of 2k after 30k against torch's fastest", max(ratios["chunk"]), 1.15),
    ]
