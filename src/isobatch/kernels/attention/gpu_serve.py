"""Which member serves, by a written rule over plain ints: query counts, context lengths, number of requests.

The rule can be wrong about speed and cannot be wrong about bits, because whatever it picks is certified.
It was fitted on one H200: 32 heads over 8, head size 128, bf16.

Decode, by programs = requests x key/value heads:
- few programs and long contexts: the three phases, which share one request's keys among programs;
- otherwise streamed, where kernels in Gluon run and heads have at most 128 numbers, unless both programs and
  keys are few;
- or else keys down the tile, for such heads and up to two programs per multiprocessor;
- sixteen rows beyond, and always for groups of more than 16 heads.
Chunks, by queries:
- fed, where kernels in Gluon run and heads have 64 or 128 numbers: 64 queries or more of a fresh prompt,
  which is read where the step has it, or 256 after a prefix, which is gathered;
- 512 queries or more after a prefix of no more than a third of them: the library, where it is certified, in
  batches of requests that are nearly as long;
- 1,024 queries or more: keys copied out of their pages and read by the bulk copy engine;
- otherwise tiles of 128 rows over the pages, or of 64 where that holds the whole chunk or heads have more
  than 128 numbers.
Recorded steps with chunks, of which nobody knows the lengths beforehand: tiles of 64 rows; single queries are
streamed, or keys run down the tile, for heads of at most 128 numbers and groups of at most 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from isobatch.kernels.attention.cudnn import attention_cudnn, fresh_prompt
from isobatch.kernels.attention.gather import gather
from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows, cut
from isobatch.kernels.attention.padded import planned
from isobatch.kernels.attention.triton import Tile, attention_contiguous, attention_listed, attention_tiled
from isobatch.kernels.attention.triton_decode import Down, attention_down, down_of
from isobatch.kernels.attention.triton_phases import attention_phases
from isobatch.kernels.gpu.device import gluon_runs, multiprocessors
from isobatch.kernels.layout import StepKeys, TiledRows

_GROUP = 16  # heads of a group that decode's narrow side has room for
_WIDE = 128  # beyond this head size one block of keys and values fills half a multiprocessor
_FED_SIZES = (64, 128)  # what a row of shared memory is swizzled for
_FED_QUERIES = 64
_FED_AFTER_PREFIX = 256
_LIBRARY_QUERIES = 512
_GATHER_QUERIES = 1024
_PAIRS_PER_KEY = 750  # of queries and keys that are computed in the time that a prompt alone loses, per key
_LAUNCH_KEYS = 400  # what its launch costs, likewise
_PHASES_PROGRAMS = 48
_PHASES_CONTEXT = 512  # and at least the square of the programs
_STREAMED_CONTEXT = 1024

Decode = Literal["tiles", "down", "streamed", "phases"]
Chunk = Literal["tiles", "gathered", "library", "fed"]


def _small(head_size: int) -> Tile:
    """The member for tiles of few rows, and for those that a recording reads."""
    return Tile(64, 8, 1, packed=True) if head_size > _WIDE else Tile(64, 4, 2, packed=True)


def _down(head_size: int) -> Down:
    return Down(4, 3 if head_size <= _WIDE else 1)


def feeds(head_size: int) -> bool:
    """Whether chunks may be fed: the library then has nothing to do."""
    return gluon_runs() and head_size in _FED_SIZES


def batches(contexts: Sequence[int], chosen: Sequence[int]) -> list[tuple[int, ...]]:
    """Requests that the library serves at once, the longest first.

    Alone a short prompt leaves most of the GPU idle; beside a longer one it is computed at that one's length.

    Args:
        contexts: of each request.
        chosen: the requests to serve.
    """
    found: list[list[int]] = []
    for r in sorted(chosen, key=lambda r: -contexts[r]):
        longest, context = contexts[found[-1][0]] if found else 0, contexts[r]
        if found and longest**2 - context**2 <= _PAIRS_PER_KEY * (context + _LAUNCH_KEYS):
            found[-1].append(r)
        else:
            found.append([r])
    return [tuple(batch) for batch in found]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a recording's requests are told apart: chunks are cut, single queries are decode's if they may be.

    Args:
        heads: of the model.
        kv_heads: key/value heads.
        head_size: D.
    """

    heads: int
    kv_heads: int
    head_size: int

    def cut(self, queries: Sequence[int], contexts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """For each tile the request, and the tile's first row within it; and the requests without a tile."""
        group, height = self.heads // self.kv_heads, _small(self.head_size).rows
        alone = group <= _GROUP and self.head_size <= _WIDE
        singles = [r for r, count in enumerate(queries) if alone and count == 1]
        tiled = [r for r, count in enumerate(queries) if not alone or count != 1]
        return *cut(queries, contexts, tiled, group, height), singles


@dataclass(frozen=True, slots=True)
class Attention:
    """Paged causal attention; callable like the CPU's launcher.

    Args:
        library: whether cuDNN is certified for the model's heads and dtype (`gpu_record.certify_library`).
        decode: the member for single queries; None leaves it to the rule.
        chunk: the member for chunks; None leaves it to the rule.
        gluon: whether kernels in Gluon may serve, where they run.
        deep: keys, or requests times key/value heads, from which on rings have room for three blocks and
            threads for all registers.
    """

    library: bool = False
    decode: Decode | None = None
    chunk: Chunk | None = None
    gluon: bool = True
    deep: int = 4096

    def __call__(
        self,
        q: torch.Tensor,
        cache: GpuKVCache,
        rows: GpuPagedRows | TiledRows,
        scale: float,
        own: StepKeys | None = None,
    ) -> torch.Tensor:
        """Causal grouped-query attention over paged keys and values.

        Args:
            q: bf16 or fp16 [T, H, D], on the device, D contiguous.
            cache: of the layer, with this step's own keys and values already written.
            rows: whose queries these are. Tiles that are cut already are of `Tiling`'s.
            scale: of the scores, positive.
            own: the step's own keys and values. They spare fresh prompts that are fed all copies, and one
                that is alone in a step if the library has plans for its length.

        Returns:
            Like q, contiguous. A padded request's row, of context length 0, is zero; of `TiledRows` nobody
            writes it, and it is anything.

        Determinism:
            Row t depends on its query and on its request's keys and values up to its position.
        """
        if isinstance(rows, TiledRows):
            return self._listed(q, cache, rows, scale)
        lone = rows.queries == rows.contexts == (len(q),) and planned(len(q)) == len(q)
        if lone and own is not None and self.chunk_member(len(q), len(q), q.shape[2]) == "library":
            return fresh_prompt(q, *own, scale)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if rows.decodes:
            self._decode(q, cache, rows, scale, out)
        waiting: dict[Chunk, list[int]] = {}
        for r in rows.chunks:
            waiting.setdefault(self.chunk_member(rows.queries[r], rows.contexts[r], q.shape[2]), []).append(r)
        for member, requests in waiting.items():
            self._chunks(member, q, cache, rows, scale, tuple(requests), own, out)
        return out

    def chunk_member(self, queries: int, context: int, head_size: int) -> Chunk:
        """The member for a chunk of `queries` tokens that ends at `context`."""
        whole = 4 * queries >= 3 * context  # the library computes the prefix's rows, too
        fed = self.gluon and feeds(head_size)
        if self.chunk is not None and {"library": whole, "fed": fed}.get(self.chunk, True):
            return self.chunk
        if fed and queries >= (_FED_QUERIES if queries == context else _FED_AFTER_PREFIX):
            return "fed"
        if self.library and whole and queries >= _LIBRARY_QUERIES:
            return "library"
        return "gathered" if queries >= _GATHER_QUERIES else "tiles"

    def decode_member(self, requests: int, kv_heads: int, group: int, head_size: int, context: int) -> Decode:
        """The member for single queries of this many requests, whose contexts are at most `context`."""
        if group > _GROUP:
            return "tiles"
        programs, gluon = requests * kv_heads, self._gluon(head_size)
        if self.decode is not None:
            return "down" if self.decode == "streamed" and not gluon else self.decode
        if programs <= _PHASES_PROGRAMS and context >= max(_PHASES_CONTEXT, programs**2):
            return "phases"
        if gluon and (programs > multiprocessors() or context >= _STREAMED_CONTEXT):
            return "streamed"
        return "down" if programs <= 2 * multiprocessors() and head_size <= _WIDE else "tiles"

    def _listed(self, q: torch.Tensor, cache: GpuKVCache, rows: TiledRows, scale: float) -> torch.Tensor:
        D, known = cache.k.shape[3], (rows.singles, len(rows.singles), rows.single_count)
        out = attention_listed(q, cache, rows, scale, tile=_small(D))
        if not len(rows.singles):
            return out
        if self._gluon(D):
            from isobatch.kernels.attention.gluon_decode import Streamed, streamed_of

            streamed_of(q, cache, rows, scale, *known, streamed=Streamed(3), out=out)
        else:
            down_of(q, cache, rows, scale, *known, down=_down(D), out=out)
        return out

    def _gluon(self, head_size: int) -> bool:
        return self.gluon and head_size <= _WIDE and gluon_runs()

    def _decode(
        self, q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float, out: torch.Tensor
    ) -> None:
        chosen, kv_heads, D = rows.decodes, cache.k.shape[1], cache.k.shape[3]
        context = max(rows.contexts[r] for r in chosen)
        member = self.decode_member(len(chosen), kv_heads, q.shape[1] // kv_heads, D, context)
        if member == "phases":
            attention_phases(q, cache, rows, scale, fed=self._gluon(D), chosen=chosen, out=out)
        elif member == "streamed":
            from isobatch.kernels.attention.gluon_decode import Streamed, attention_streamed

            deep = max(context, len(chosen) * kv_heads) >= self.deep
            streamed = Streamed(3) if deep else Streamed(2, registers=128)
            attention_streamed(q, cache, rows, scale, streamed=streamed, chosen=chosen, out=out)
        elif member == "down":
            attention_down(q, cache, rows, scale, down=_down(D), chosen=chosen, out=out)
        else:
            tile = Tile(16, 2, 2, packed=True) if D <= _WIDE else Tile(16, 4, 1, packed=True)
            attention_tiled(q, cache, rows, scale, tile=tile, chosen=chosen, out=out)

    def _chunks(
        self,
        member: Chunk,
        q: torch.Tensor,
        cache: GpuKVCache,
        rows: GpuPagedRows,
        scale: float,
        chosen: tuple[int, ...],
        own: StepKeys | None,
        out: torch.Tensor,
    ) -> None:
        wide = cache.k.shape[3] > _WIDE
        if member == "tiles":
            rows_of_q = max(rows.queries[r] for r in chosen) * (q.shape[1] // cache.k.shape[1])
            tile = _small(cache.k.shape[3]) if wide or rows_of_q <= 64 else Tile(128, 8, 3, packed=True)
            attention_tiled(q, cache, rows, scale, tile=tile, chosen=chosen, out=out)
        elif member == "library":
            for batch in rows.once(("batches", chosen), lambda: batches(rows.contexts, chosen)):
                attention_cudnn(q, cache, rows, scale, chosen=batch, out=out)
        elif member == "fed":
            from isobatch.kernels.attention.gluon_prefill import attention_fed

            attention_fed(q, cache, rows, scale, chosen=chosen, own=own, out=out)
        else:
            key, value, origins = gather(cache, rows, chosen)
            tile = Tile(128, 8, 1 if wide else 3, packed=True)
            attention_contiguous(q, key, value, origins, rows, scale, tile=tile, chosen=chosen, out=out)


serve = Attention()
"""The rule without the library, which is a member only once it is certified."""
