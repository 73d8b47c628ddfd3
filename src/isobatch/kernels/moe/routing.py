"""Which experts serve a token, and where each of its copies goes.

Written order. Router: float32, IEEE, on the ordinary units: 256 lanes, lane t adds x_k * w_k over the k with
k mod 256 == t, ascending, each step a fused multiply-add from zero; the lanes fold in halves (t with t + 128,
then + 64, ... 1). The chosen experts are the `active` largest logits, ties to the lowest id; NaN ranks as
infinity. Weights:
e_i = ex2(round((logit_i - max) * log2(e))). Renormalised, a chosen expert's weight is e_i over the sum of the
chosen e's, added in ascending expert id (the softmax over all experts would cancel); else over the sum of all
e's, folded in halves like the lanes, zeros making their number a power of two.

Sorting: copies go by expert, and within one by token. Positions are integers, so nothing here is rounded.

Shape letters: T tokens, E experts, A active experts per token, K hidden width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from isobatch.kernels.gpu.device import device
from isobatch.kernels.gpu.overlap import early, inputs_ready, next_may_begin
from isobatch.kernels.gpu.ptx import ex2, fma, mul, sub

_LANES = 256
_FEW_TOKENS = 16
_LOG2_E = math.log2(math.e)


@triton.jit
def _folded(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, COLUMNS, WIDTH] summed over its last axis: t with t + WIDTH/2, and so on."""
    if WIDTH == 1:
        return tl.reshape(x, (ROWS, COLUMNS))
    else:
        half: tl.constexpr = WIDTH // 2
        low, high = tl.split(tl.permute(tl.reshape(x, (ROWS, COLUMNS, 2, half)), (0, 1, 3, 2)))
        return _folded(low + high, ROWS, COLUMNS, half)


@triton.jit(do_not_specialize=["T"])
def _router_kernel(
    x, w, logits, T, E, K, x_stride,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    next_may_begin()
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    lane = tl.arange(0, LANES)
    x_rows = x + tl.where(t < T, t, 0).to(tl.int64)[:, None] * x_stride + lane[None, :]
    w_rows = w + tl.where(e < E, e, 0)[:, None] * K + lane[None, :]
    acc = tl.zeros((ROWS, EXPERTS, LANES), tl.float32)
    for k in range(0, K, LANES):
        # A product of zeros beyond K changes no lane.
        a = tl.load(x_rows + k, mask=(k + lane < K)[None, :], other=0.0).to(tl.float32)
        b = tl.load(w_rows + k, mask=(k + lane < K)[None, :], other=0.0).to(tl.float32)
        a3 = tl.broadcast_to(a[:, None, :], (ROWS, EXPERTS, LANES))
        b3 = tl.broadcast_to(b[None, :, :], (ROWS, EXPERTS, LANES))
        acc = fma(a3, b3, acc)
    total = _folded(acc, ROWS, EXPERTS, LANES)
    tl.store(logits + t[:, None] * E + e[None, :], total, mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["T"])
def _choose_kernel(
    logits, experts, weights, ranks, counts, T, E, log2_e,
    ACTIVE: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """One chunk of tokens: the chosen experts ascending, their weights, and each copy's rank in the chunk."""
    inputs_ready()
    next_may_begin()
    chunk = tl.program_id(0)
    t, e = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, EXPERTS)
    inside = (t < T)[:, None] & (e < E)[None, :]
    values = tl.load(logits + t[:, None] * E + e[None, :], mask=inside, other=float("-inf"))
    # Tokens that are not there get a row of ordinary numbers, which nobody reads.
    values = tl.where((t < T)[:, None], values, 0.0)
    ids = tl.broadcast_to(e[None, :], (CHUNK, EXPERTS))
    # NaN ranks above all, so that its token comes out as NaN and no expert is chosen twice or not at all.
    rank = tl.where(values == values, values, float("inf"))
    top = tl.max(rank, 1)
    chosen, free = ids < 0, ids < E
    for _ in tl.static_range(ACTIVE):
        best = tl.max(tl.where(free, rank, float("-inf")), 1)
        first = tl.min(tl.where(free & (rank == best[:, None]), ids, EXPERTS), 1)
        chosen = chosen | (ids == first[:, None])
        free = free & (ids != first[:, None])
    chosen = chosen & inside
    zeros = tl.zeros((CHUNK, EXPERTS), tl.float32)
    all_powers = ex2(mul(sub(values, top[:, None] + zeros), log2_e + zeros))
    powers = tl.where(chosen, all_powers, 0.0)
    taken = chosen.to(tl.int32)
    slot = tl.cumsum(taken, 1) - 1
    total = tl.zeros((CHUNK,), tl.float32)
    if RENORMALISE:
        for s in tl.static_range(ACTIVE):
            # One term and zeros: exact in any order.
            total = total + tl.sum(tl.where(chosen & (slot == s), powers, 0.0), 1)
    else:
        inside_powers = tl.where(e[None, :] < E, all_powers, 0.0)
        folded = _folded(tl.reshape(inside_powers, (CHUNK, 1, EXPERTS)), CHUNK, 1, EXPERTS)
        total = tl.reshape(folded, (CHUNK,))
    total = tl.where(t < T, total, 1.0)
    at = t[:, None] * ACTIVE + slot
    tl.store(experts + at, ids, mask=chosen)
    tl.store(weights + at, powers / total[:, None], mask=chosen)
    tl.store(ranks + at, tl.cumsum(taken, 0) - taken, mask=chosen)
    tl.store(counts + chunk * EXPERTS + e, tl.sum(taken, 0))


@triton.jit(do_not_specialize=["T", "chunks", "most_tiles"])
def _place_kernel(
    experts, ranks, counts, rows, tokens, starts, tile_experts, tile_rows, T, chunks, most_tiles,
    ACTIVE: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each copy of one chunk goes; the first program also lists the tiles of the grouped products."""
    inputs_ready()
    next_may_begin()
    chunk = tl.program_id(0)
    e, line = tl.arange(0, EXPERTS), tl.arange(0, BLOCK)
    total, before = tl.zeros((EXPERTS,), tl.int32), tl.zeros((EXPERTS,), tl.int32)
    for c in range(0, chunks, BLOCK):
        at = (c + line)[:, None]
        part = tl.load(counts + at * EXPERTS + e[None, :], mask=at < chunks, other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where(at < chunk, part, 0), 0)
    start = tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(starts + e, start)
        tl.store(starts + EXPERTS + e, start + total)
        tiles = (total + ROWS - 1) // ROWS
        first = tl.cumsum(tiles, 0) - tiles
        used = tl.sum(tiles, 0)
        for i in range(0, most_tiles, EXPERTS):
            tl.store(tile_experts + i + e, -1, mask=(i + e >= used) & (i + e < most_tiles))
        for j in range(tl.cdiv(T, ROWS)):
            tl.store(tile_experts + first + j, e, mask=j < tiles)
            tl.store(tile_rows + first + j, start + j * ROWS, mask=j < tiles)
    base = start + before
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    for s in tl.static_range(ACTIVE):
        at = t * ACTIVE + s
        expert = tl.load(experts + at, mask=t < T, other=0)
        mine = expert[:, None] == e[None, :]
        row = tl.sum(tl.where(mine, base[None, :], 0), 1) + tl.load(ranks + at, mask=t < T, other=0)
        tl.store(rows + at, row, mask=t < T)
        tl.store(tokens + row, t, mask=t < T)


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the copies of a batch's tokens go. All on the device; the host knows only the bounds.

    Args:
        weights: float32 [T, A], by ascending expert id.
        rows: int32 [T, A]: the row of each copy among all copies, sorted by expert.
        tokens: int32 [T A]: the token of each row.
        ends: int32 [E']: one past the last row of each expert, E' being E up to a power of two.
        tile_experts: int32 [most tiles]: the expert of each tile of rows, -1 beyond the last.
        tile_rows: int32 [most tiles]: its first row.
    """

    weights: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    ends: torch.Tensor
    tile_experts: torch.Tensor
    tile_rows: torch.Tensor


def router_logits(x: torch.Tensor, router: torch.Tensor, tile: tuple[int, int] | None = None) -> torch.Tensor:
    """How well each expert suits each token.

    Args:
        x: bfloat16 or float16 [T, K].
        router: the same dtype [E, K], contiguous.
        tile: tokens and experts per program; by the number of tokens if None. It can reach no bit.

    Returns:
        float32 [T, E].
    """
    (T, K), E = x.shape, len(router)
    rows, experts = tile or ((1, 1) if T <= _FEW_TOKENS else (4, 8))
    logits = torch.empty(T, E, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(T, rows), triton.cdiv(E, experts))
    _router_kernel[grid](
        x,
        router,
        logits,
        T,
        E,
        K,
        x.stride(0),
        ROWS=rows,
        EXPERTS=experts,
        LANES=_LANES,
        num_warps=2 if experts == 1 else 4,
        **early(),
    )
    return logits


def route(logits: torch.Tensor, active: int, tile_rows: int, *, renormalise: bool = True) -> Routing:
    """Chooses each token's experts and sorts the copies by expert.

    Args:
        logits: float32 [T, E].
        active: experts per token.
        tile_rows: rows of a tile of the grouped products to come.
        renormalise: whether weights are shares of the chosen experts, or of all.
    """
    T, E = logits.shape
    # Tokens are ranked in chunks. Ranks are integers, so the size of a chunk is free.
    chunk, warps = (4, 4) if T <= _FEW_TOKENS else (32, 8)
    padded, chunks = triton.next_power_of_2(E), triton.cdiv(T, chunk)
    most_tiles = min(T * active, triton.cdiv(T * active, tile_rows) + E)

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device())

    experts, ranks, rows, tokens = ints(T, active), ints(T, active), ints(T, active), ints(T * active)
    counts, starts = ints(chunks, padded), ints(2, padded)
    tile_experts, tile_starts = ints(most_tiles), ints(most_tiles)
    weights = torch.empty(T, active, dtype=torch.float32, device=device())
    _choose_kernel[(chunks,)](
        logits, experts, weights, ranks, counts, T, E, _LOG2_E,
        ACTIVE=active, EXPERTS=padded, CHUNK=chunk, RENORMALISE=renormalise, num_warps=warps, **early(),
    )  # fmt: skip
    _place_kernel[(chunks,)](
        experts, ranks, counts, rows, tokens, starts, tile_experts, tile_starts, T, chunks, most_tiles,
        ACTIVE=active, EXPERTS=padded, CHUNK=chunk, ROWS=tile_rows, BLOCK=16, num_warps=warps, **early(),
    )  # fmt: skip
    return Routing(weights, rows, tokens, starts[1], tile_experts, tile_starts)
