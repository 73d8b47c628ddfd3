"""The KV cache on the GPU, and what a launcher must know about a step without asking the device.

Shape letters: R requests, T query rows, Hkv key/value heads, G query heads per key/value head, D head size.

A launcher may not read device memory: that would stall the queue, and a CUDA graph could not be captured. So
`GpuPagedRows` carries, beside the tensors of `PagedRows`, the lengths as plain ints. They decide which
members run and how large their grids are, never what a row's bits are: every choice among members is
certified.

- Requests with one query are decode steps. Their kernels take the length from `context_lengths`, on the
  device, so the plain int needs only be an upper bound: a CUDA graph is captured once with the largest
  context it will see, and replayed with any. A padded request has context length 0; its row is inert and
  comes out as zeros.
- Requests with several queries are chunks. They are cut into tiles of query rows, and the list of all
  requests' tiles, longest first so that no straggler is left at the end, is made here from the plain ints and
  copied once for all layers. So many ragged requests fill the GPU with no program that has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeVar

import torch

from isobatch.kernels.gpu.device import device
from isobatch.kernels.layout import PAGE, PagedRows

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GpuKVCache:
    """Keys and values of one layer on the GPU.

    A page of one head is one contiguous piece (4 KiB at head size 128), so that a kernel that reads one head
    reads whole lines, and a page is one k-step of the tensor core.

    Args:
        k: bf16 or fp16 [blocks, Hkv, 16, D], contiguous.
        v: likewise.
    """

    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def empty(
        cls, blocks: int, kv_heads: int, head_size: int, dtype: torch.dtype = torch.bfloat16
    ) -> GpuKVCache:
        """Uninitialised memory: nothing that was not written for the same request enters a sum."""
        shape = (blocks, kv_heads, PAGE, head_size)
        return cls(*(torch.empty(shape, dtype=dtype, device=device()) for _ in "kv"))


def cut(
    queries: Sequence[int], contexts: Sequence[int], chosen: Sequence[int], per_query: int, height: int
) -> tuple[list[int], list[int]]:
    """Cuts requests into tiles of query rows, those with the most keys first.

    Args:
        queries: of each request.
        contexts: of each request, its queries' own keys included.
        chosen: the requests.
        per_query: rows that one query makes: the heads that are packed into a tile, or 1.
        height: rows of a tile.

    Returns:
        For each tile the request, and the tile's first row within it.
    """
    tiles = []
    for r in chosen:
        before = contexts[r] - queries[r]
        for first in range(0, queries[r] * per_query, height):
            last = min(first + height, queries[r] * per_query) - 1
            tiles.append((-(before + last // per_query), r, first))
    tiles.sort()
    return [r for _, r, _ in tiles], [first for _, _, first in tiles]


@dataclass(frozen=True, slots=True)
class GpuPagedRows(PagedRows):
    """`PagedRows` on the device, and its lengths as plain ints on the host.

    Args:
        queries: query rows of each request; 0 and padded requests are allowed.
        contexts: keys of each request, its queries' own included: exact for a request with several queries,
            an upper bound for one with a single query.
    """

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    _made: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: object, make: Callable[[], _T]) -> _T:
        """What `make` gives, made when first asked for and then kept: a step has many layers."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    @property
    def begins(self) -> tuple[int, ...]:
        """Each request's first row."""
        return self.once("begins", lambda: (0, *accumulate(self.queries))[:-1])

    @property
    def decodes(self) -> tuple[int, ...]:
        """The requests with a single query."""
        return self.once("decodes", lambda: tuple(r for r, n in enumerate(self.queries) if n == 1))

    @property
    def chunks(self) -> tuple[int, ...]:
        """The requests with several queries."""
        return self.once("chunks", lambda: tuple(r for r, n in enumerate(self.queries) if n > 1))

    def requests(self, chosen: tuple[int, ...]) -> torch.Tensor | None:
        """These requests as int32 on the device; None where they are all there are, in order."""
        if chosen == tuple(range(len(self.queries))):
            return None
        return self.once(("requests", chosen), lambda: self.upload(chosen))

    def tiles(self, chosen: tuple[int, ...], per_query: int, height: int) -> torch.Tensor:
        """The tiles of `cut`, int32 [2, tiles] on the device."""

        def make() -> torch.Tensor:
            return self.upload(cut(self.queries, self.contexts, chosen, per_query, height))

        return self.once((chosen, per_query, height), make)

    @staticmethod
    def upload(numbers: object) -> torch.Tensor:
        """Plain ints as int32 on the device; from pinned memory, so that nothing queued is waited for."""
        pinned = device().type != "cpu"
        return torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=pinned).to(
            device(), non_blocking=True
        )
