"""Attention's record, and its case: rows are queries, each with a request and a position in it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from isobatch.kernels.attention import cpu, stock
from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.cpu.tile import MAX_ROWS
from isobatch.kernels.data import floats, integers
from isobatch.kernels.layout import PAGE, Layout, PagedRows
from isobatch.kernels.registry import Member, OpRecord, Outputs, Reordering
from isobatch.kernels.stock import STOCK

_WRITERS: dict[Layout, Callable[..., None]] = {CPU: cpu.write_kv, STOCK: stock.write_kv}


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Queries at positions of requests.

    Args:
        queries: (request, position) of each row; neighbours in one request at successive positions form a
            chunk, a single one is a decode step.
        q: float32 [requests, length, H, D], every request's query at every position.
        k: float32 [requests, length, Hkv, D].
        v: float32 [requests, length, Hkv, D].
        shuffle: which blocks each request was given.
        fill: what unused memory holds.
    """

    queries: tuple[tuple[int, int], ...]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    shuffle: int = 0
    fill: float = math.nan

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return len(self.queries)

    def _chunks(self) -> list[list[tuple[int, int]]]:
        chunks: list[list[tuple[int, int]]] = []
        for request, position in self.queries:
            if chunks and chunks[-1][-1] == (request, position - 1):
                chunks[-1].append((request, position))
            else:
                chunks.append([(request, position)])
        return chunks

    def prepare(self, member: Member) -> Callable[[], Outputs]:
        """Fills a paged cache."""
        chunks = self._chunks()
        pages = -(-self.q.shape[1] // PAGE)
        total = len(chunks) * pages + 3
        order = random.Random(self.shuffle).sample(range(total), total)
        tables = torch.tensor(order[: len(chunks) * pages], dtype=torch.int32).reshape(-1, pages)
        cache: Any = member.layout.cache.empty(total, self.k.shape[2], self.k.shape[3])
        fill = self.fill if member.layout is CPU else 0.0
        cache.k.fill_(fill)
        cache.v.fill_(fill)
        write = _WRITERS[member.layout]
        starts, lengths = [0], []
        for chunk, table in zip(chunks, tables, strict=True):
            request, last = chunk[-1]
            at = torch.arange(last + 1)
            slots = table[at // PAGE].long() * PAGE + at % PAGE
            keys, values = self.k[request, : last + 1], self.v[request, : last + 1]
            write(keys, values, cache, PagedRows(at, at, at, slots))
            starts.append(starts[-1] + len(chunk))
            lengths.append(last + 1)
        rows = PagedRows(
            torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), tables, slots
        )
        q = torch.stack([self.q[request, position] for request, position in self.queries])
        scale = 1 / math.sqrt(q.shape[-1])
        return lambda: (member.function(q=q, cache=cache, rows=rows, scale=scale),)

    def call(self, member: Member) -> Outputs:
        """Fills a paged cache and attends."""
        return self.prepare(member)()

    def take(self, indices: Sequence[int]) -> AttentionCase:
        """These queries only: a row alone becomes a decode step."""
        return replace(self, queries=tuple(self.queries[i] for i in indices))

    def poison(self, keep: Sequence[int], value: float) -> AttentionCase:
        """`value` in all queries, keys and values that no kept row may see: others', and later ones'."""
        q, k, v = self.q.clone(), self.k.clone(), self.v.clone()
        kept = [self.queries[i] for i in keep]
        for request in range(len(q)):
            positions = [p for r, p in kept if r == request]
            seen = max(positions) + 1 if positions else 0
            k[request, seen:] = value
            v[request, seen:] = value
            others = [p for p in range(q.shape[1]) if p not in positions]
            q[request, others] = value
        return replace(self, q=q, k=k, v=v)

    def relayout(self) -> AttentionCase:
        """Other blocks, other garbage in unused memory."""
        return replace(self, shuffle=self.shuffle + 1, fill=3e38)


_SHAPES = {"grouped": (6, 2, 32), "wide head": (2, 2, 64)}
_LENGTH = 300


def draw(name: str, rows: int, variant: str) -> AttentionCase:
    """Chunks of three requests that end on both sides of page and span edges, and decode rows."""
    H, Hkv, D = _SHAPES[variant]
    queries: list[tuple[int, int]] = []
    ends = (1, 16, 17, 127, 128, 129, 255, 256, 257, _LENGTH)
    for i, pick in enumerate(integers(f"{name}/ends", rows, len(ends)).tolist()):
        if len(queries) >= rows:
            break
        stop = ends[pick]
        size = (1, 40, 1, 200)[i % 4]
        queries += [(i % 3, p) for p in range(max(0, stop - size), stop)]
    return AttentionCase(
        tuple(queries[-rows:]),
        floats(f"{name}/q", 3, _LENGTH, H, D, kind="plain"),
        floats(f"{name}/k", 3, _LENGTH, Hkv, D, kind="plain"),
        floats(f"{name}/v", 3, _LENGTH, Hkv, D),
    )


def reorder(case: AttentionCase) -> Reordering:
    """Keys and values rolled by one place: only a last position sees the same set before and after."""
    last = replace(case, queries=tuple((r, _LENGTH - 1) for r in range(len(case.q))))
    return Reordering(last, replace(last, k=case.k.roll(1, 1), v=case.v.roll(1, 1)))


ATTENTION = OpRecord(
    name="attention",
    order=cpu.__doc__ or "",
    free_axes=("rows", "requests", "context", "blocks"),
    fixed_axes=("H", "Hkv", "D", "scale"),
    members=(
        Member("row", cpu.attention_row, CPU),
        Member("queries", cpu.attention_queries, CPU),
        Member("packed", cpu.attention_packed, CPU),
    ),
    production="packed",
    stock=Member("torch", stock.attention, STOCK),
    reference=stock.attention_ref,
    draw=draw,
    variants=tuple(_SHAPES),
    thresholds=(MAX_ROWS, 16, 40, 128, 241),
    reorder=reorder,
)
