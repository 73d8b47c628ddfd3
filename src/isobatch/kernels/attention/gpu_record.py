"""Attention's record on the GPU: the CPU's cases in the GPU's dtypes, over caches that begin as garbage."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache as cached
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from isobatch.errors import IsobatchError
from isobatch.kernels.attention import stock, triton
from isobatch.kernels.attention.gather import gather
from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.attention.gpu_serve import Attention, Tiling, feeds, serve
from isobatch.kernels.attention.record import AttentionCase
from isobatch.kernels.attention.triton import Tile, attention_row, attention_tiled
from isobatch.kernels.attention.triton_write import write_kv
from isobatch.kernels.bitclass import Verdict, certify
from isobatch.kernels.data import floats, integers
from isobatch.kernels.gpu.data import case_variants, split_variant
from isobatch.kernels.gpu.device import INTERPRETED, device, gluon_runs
from isobatch.kernels.layout import PAGE, Layout, PagedRows, StepKeys, TiledRows
from isobatch.kernels.registry import Member, OpRecord, Outputs, Reordering
from isobatch.kernels.stock import STOCK, DenseCache, DenseStack, DenseWeight

GPU_ATTENTION = Layout(weight=DenseWeight, cache=GpuKVCache, stack=DenseStack)
_SHAPES = (
    {"grouped": (2, 1, 16)}
    if INTERPRETED
    else {"grouped": (8, 2, 128), "small head": (6, 2, 64), "odd head": (10, 2, 96), "wide head": (4, 2, 256)}
)
_LENGTH = 256 if INTERPRETED else 768


class GpuAttentionCase(AttentionCase):
    """As on the CPU, with q, k and v in a GPU dtype on the device."""

    __slots__ = ()

    def prepare(self, member: Member) -> Callable[[], Outputs]:
        """Fills a paged cache."""
        chunks = self._chunks()
        pages = -(-self.q.shape[1] // PAGE)
        total = len(chunks) * pages + 3
        order = random.Random(self.shuffle).sample(range(total), total)
        tables = torch.tensor(order[: len(chunks) * pages], dtype=torch.int32).reshape(-1, pages).to(device())
        kv_heads, D = self.k.shape[2:]
        dense = member.layout is STOCK
        cache: Any
        if dense:
            cache = DenseCache(
                *(torch.zeros(total, PAGE, kv_heads, D, dtype=self.q.dtype, device=device()) for _ in "kv")
            )
        else:
            cache = GpuKVCache.empty(total, kv_heads, D, self.q.dtype)
            fill = self.fill if math.isnan(self.fill) else min(self.fill, torch.finfo(self.q.dtype).max)
            cache.k.fill_(fill)
            cache.v.fill_(fill)
        starts, lengths = [0], []
        for chunk, table in zip(chunks, tables, strict=True):
            request, last = chunk[-1]
            at = torch.arange(last + 1, device=device())
            slots = table[at // PAGE].long() * PAGE + at % PAGE
            keys, values = self.k[request, : last + 1], self.v[request, : last + 1]
            (stock.write_kv if dense else write_kv)(keys, values, cache, PagedRows(at, at, at, slots))
            starts.append(starts[-1] + len(chunk))
            lengths.append(last + 1)
        rows = GpuPagedRows(
            GpuPagedRows.upload(starts),
            GpuPagedRows.upload(lengths),
            tables,
            slots,
            tuple(b - a for a, b in pairwise(starts)),
            tuple(lengths),
            settled=True,
        )
        q = torch.stack([self.q[request, position] for request, position in self.queries])
        return lambda: (member.function(q=q, cache=cache, rows=rows, scale=1 / math.sqrt(D)),)


def draw(name: str, rows: int, variant: str) -> GpuAttentionCase:
    """Chunks of three requests that end on both sides of page and block edges, and decode rows."""
    shape, dtype = split_variant(variant)
    H, Hkv, D = _SHAPES[shape]
    queries: list[tuple[int, int]] = []
    ends = [e for e in (1, 16, 17, 127, 128, 129, 255, 256, 257, 513, 640) if e < _LENGTH] + [_LENGTH]
    for i, pick in enumerate(integers(f"{name}/ends", rows, len(ends)).tolist()):
        if len(queries) >= rows:
            break
        stop = ends[pick]
        size = (1, 40, 1, 500)[i % 4]
        queries += [(i % 3, p) for p in range(max(0, stop - size), stop)]

    # Whatever is drawn, one row sees all the keys: on few keys two orders may agree.
    queries = [*queries[len(queries) - rows + 1 :], (2, _LENGTH - 1)]
    return GpuAttentionCase(tuple(queries), *numbers(variant, 3, _LENGTH, H, Hkv, D, dtype))


@cached
def numbers(
    name: str, requests: int, length: int, H: int, Hkv: int, D: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values whose blocks cancel one another, so that sixteen bits still show an order.

    Kept, since certification asks for the same ones at many row counts and drawing them takes the longest.

    A key is that of 128 places before, and its value nearly the negative: what is left of a sum is rounding.
    In the second block and every sixth from there all weights are about doubled, and values halved: there the
    maximum moves, and what was summed before is rescaled.
    """
    q = floats(f"{name}/q", requests, length, H, D, kind="plain")
    k = floats(f"{name}/k", requests, length, Hkv, D, kind="plain")
    v = floats(f"{name}/v", requests, length, Hkv, D)
    q[..., 0], k[..., 0] = 1, 0
    for at in range(128, length):
        moves = at // 128 % 6 == 1
        k[:, at] = k[:, at - 128]
        k[:, at, :, 0] += math.sqrt(D) * math.log(2) if moves else 0
        v[:, at] = -v[:, at - 128] * (1 + 2.0**-10) / (2 if moves else 1)
    return q.to(device(), dtype), k.to(device(), dtype), v.to(device(), dtype)


def reorder(case: GpuAttentionCase) -> Reordering:
    """Keys and values rolled by one place: only a last position sees the same set before and after."""
    last = replace(case, queries=tuple((r, _LENGTH - 1) for r in range(len(case.q))))
    return Reordering(last, replace(last, k=case.k.roll(1, 1), v=case.v.roll(1, 1)))


def _tiled(tile: Tile) -> Any:
    def run(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
        return attention_tiled(q, cache, rows, scale, tile=tile)

    return run


def _listed(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
    """As a recording has it: one more request without queries, with a tile; and room for one more single."""
    tiling, nobody = Tiling(q.shape[1], cache.k.shape[1], q.shape[2]), len(rows.queries)
    requests, firsts, singles = tiling.cut(rows.queries, rows.contexts)
    tiles = GpuPagedRows.upload([[*requests, nobody], [*firsts, 0]])
    alone = GpuPagedRows.upload([*singles, 0] if singles else [])
    count = GpuPagedRows.upload([len(singles)])
    starts, lengths, tables = (
        torch.cat((t, t[:1] * 0)) for t in (rows.query_starts, rows.context_lengths, rows.block_tables)
    )
    # Singles are looked up after tiles, whose kernel waits.
    listed = TiledRows(starts, lengths, tables, rows.slots, tiles, alone, count, settled=True)
    return serve(q, cache, listed, scale)


# Members where Gluon runs. Elsewhere others serve under these names, and would be tried twice.
_IN_GLUON = (
    Member("streamed", Attention(decode="streamed"), GPU_ATTENTION),
    Member("streamed deep, fed", Attention(decode="streamed", deep=0, chunk="fed"), GPU_ATTENTION),
    Member("phases without Gluon", Attention(decode="phases", gluon=False), GPU_ATTENTION),
)

ATTENTION_GPU = OpRecord(
    name="attention",
    order=triton.__doc__ or "",
    free_axes=("rows", "requests", "context", "blocks"),
    fixed_axes=("H", "Hkv", "D", "scale"),
    members=(
        Member("row", attention_row, GPU_ATTENTION),
        Member("unpacked", _tiled(Tile(16, 4, 1, packed=False)), GPU_ATTENTION),
        Member("tiles", Attention(decode="tiles", chunk="tiles"), GPU_ATTENTION),
        Member("down, gathered", Attention(decode="down", chunk="gathered"), GPU_ATTENTION),
        Member("phases", Attention(decode="phases"), GPU_ATTENTION),
        *(_IN_GLUON if gluon_runs() else ()),
        Member("listed", _listed, GPU_ATTENTION),
        Member("serve", serve, GPU_ATTENTION),
    ),
    production="serve",
    stock=Member("torch", stock.attention, STOCK),
    reference=stock.attention_ref,
    draw=draw,
    variants=case_variants(*_SHAPES),
    thresholds=(2, 16) if INTERPRETED else (16, 40, 128, 512),
    reorder=reorder,
)


def side_by_side(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, StepKeys]:
    """Copies of [T, H, D] and [T, Hkv, D] that lie as `qk_norm_rotary_write` leaves them, strides and all."""
    turned, packed = torch.cat((q, key), 1), torch.cat((q, key, value), 1)
    return turned[:, : q.shape[1]], (turned[:, q.shape[1] :], packed[:, -value.shape[1] :])


def _at_hand(
    q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float, member: Attention
) -> torch.Tensor:
    """Attention of a lone prompt that is read where the step has it."""
    key, value, _ = gather(cache, rows, (0,))
    queries, own = side_by_side(q, key[: len(q)], value[: len(q)])
    return member(queries, cache, rows, scale, own)


def certify_library(H: int, kv_heads: int, head_size: int, dtype: torch.dtype) -> Verdict:
    """Whether cuDNN, as it is on this machine, gives the canonical bits for a model's heads.

    It chooses among its kernels by sizes and strides. So a prompt is tried alone, after a prefix, beside
    others of other lengths, among many, and where the step has it.

    Args:
        H: heads.
        kv_heads: key/value heads.
        head_size: D.
        dtype: bf16 or fp16.

    Returns:
        The verdict; `Attention(library=verdict.member)` is what may serve. Its reason is in `refuted_by`.

    Determinism:
        The inputs are a function of the arguments; the same on every machine.
    """

    def chunks(_name: str, rows: int, variant: str) -> GpuAttentionCase:
        spans = {
            "alone": [(0, rows)],
            "after a prefix": [(rows // 4, rows + rows // 4)],
            "beside others": [(0, rows), (rows // 4, rows), (0, rows - rows // 8)],
            "among many": [(0, rows)] * 12,
        }[variant]
        length = max(end for _, end in spans)
        # Drawing takes the longest: all cases are cut out of the same three requests.
        three = (t[:, :length] for t in numbers("library", 3, 1280, H, kv_heads, head_size, dtype))
        q, k, v = (t.repeat(-(-len(spans) // 3), 1, 1, 1)[: len(spans)] for t in three)
        return GpuAttentionCase(tuple((r, p) for r, span in enumerate(spans) for p in range(*span)), q, k, v)

    library = Attention(chunk="library")
    at_hand = partial(_at_hand, member=library)
    tried: tuple[tuple[Any, tuple[str, ...], tuple[int, ...]], ...] = (
        (library, ("alone", "after a prefix", "beside others"), (2, 77, 128, 641, 1024)),
        (library, ("among many",), (640,)),
        (at_hand, ("alone",), (128, 1024)),
    )
    inputs = 0
    try:
        for member, variants, row_counts in tried:
            record = replace(ATTENTION_GPU, draw=chunks, variants=variants, reorder=None)
            verdict = certify(record, Member("library", member, GPU_ATTENTION), row_counts)
            inputs += verdict.inputs
            if not verdict.member:
                break
        return replace(verdict, inputs=inputs)
    except (RuntimeError, IsobatchError) as error:
        return Verdict("attention", "library", False, 0, f"{type(error).__name__}: {error}")


def attention_for(H: int, kv_heads: int, head_size: int, dtype: torch.dtype) -> Attention:
    """What serves a model's heads on this machine.

    Args: as of `certify_library`, which is asked only where no kernel of ours serves prompts faster.
    """
    wanted = not INTERPRETED and not feeds(head_size)
    return Attention(library=wanted and certify_library(H, kv_heads, head_size, dtype).member)
