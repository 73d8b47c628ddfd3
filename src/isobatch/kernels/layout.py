"""How weights and caches lie in memory: our kernels and torch's want the same data in other places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from isobatch.kernels.coding import CodedRows, Coding

PAGE = 16
"""Tokens in a KV block of our kernels."""


class Weight(Protocol):
    """A weight matrix [outputs, inputs] that is filled row by row at load."""

    @property
    def outputs(self) -> int:
        """N."""

    @property
    def inputs(self) -> int:
        """K."""

    def put(self, start: int, rows: CodedRows) -> None:
        """Stores rows [start, start + len(rows)), in the weight's coding or, if that is float32, in any."""


class WeightType(Protocol):
    """Makes an empty weight."""

    def empty(self, outputs: int, inputs: int, coding: Coding) -> Weight:
        """A weight of this size, to be filled by `put`; it may keep the coding, or widen what it is given."""


class Stack(Protocol):
    """The matrices of a layer's experts, all of one size."""

    @property
    def weights(self) -> Sequence[Weight]:
        """Each expert's, to be filled by `Weight.put`."""


class StackType(Protocol):
    """Makes an empty stack."""

    def empty(self, outputs: int, inputs: int, codings: Sequence[Coding]) -> Stack:
        """A stack of matrices [outputs, inputs], one for each of these codings."""


class Cache(Protocol):
    """Keys and values of one layer, in blocks of a layout's page."""


class CacheType(Protocol):
    """Makes an empty cache."""

    def empty(self, blocks: int, kv_heads: int, head_size: int) -> Cache:
        """A cache of this size, uninitialised."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The layouts that a family of kernels shares.

    Args:
        weight: for linear and embedding.
        cache: for attention.
        stack: for experts.
        page: tokens in a block of the cache.
        gate_up: for gates above ups, where that is another layout than `weight`.
    """

    weight: WeightType
    cache: CacheType
    stack: StackType
    page: int = PAGE
    gate_up: WeightType | None = None


StepKeys = tuple[torch.Tensor, torch.Tensor]
"""A step's own keys and values, [T, Hkv, D] each, as they are in the cache."""


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Which request each query row belongs to, and where that request's keys lie.

    Args:
        query_starts: int32 [R + 1], ascending from 0: request r owns rows query_starts[r]..query_starts[r+1].
        context_lengths: int32 [R]: keys of request r, its queries' own included; the queries are the last.
        block_tables: int32 [R, B]: block_tables[r, i] holds keys 16 i .. 16 i + 15 of request r, where a
            layout's page is 16 tokens.
        slots: int64 [T]: block * 16 + offset at which each row's own key and value are stored.
        settled: whether all that, and the rows' positions, was written by copies, by kernels that let nobody
            begin early, or by kernels after which others came that wait. Then a kernel that is launched
            early may look it up before it waits.
    """

    query_starts: torch.Tensor
    context_lengths: torch.Tensor
    block_tables: torch.Tensor
    slots: torch.Tensor
    settled: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class TiledRows(PagedRows):
    """Requests of any number of queries, told apart already. All is read when kernels run, so that one
    recording serves every step that has no more rows, tiles and singles than it was made for.

    A request that ends where it starts, or before, is not there, and inert. Slot -1: a padded row.

    Args:
        tiles: int32 [2, tiles]: of each tile the request, and the tile's first row within it.
        singles: int32 [most]: requests of one query that have no tile. Behind their number stand any requests
            that there are, for a kernel may look them up before it knows.
        single_count: int32 [1]: how many of them there are.
    """

    tiles: torch.Tensor
    singles: torch.Tensor
    single_count: torch.Tensor
