"""Mixture of experts on the GPU, bfloat16 and float16.

Written order. Routing as in kernels/moe/routing.py. Each expert's products are linear's: one float32
accumulator per output, k ascending in tensor-core steps, rounded once to the dtype. Between them silu_and_mul
of the rounded halves. A token's results are combined in ascending expert id: acc = fma(weight, y, acc) in
float32 from zero, then rounded once.

Shape letters: T tokens, E experts, A active experts per token, K hidden width, I inner width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.gpu.overlap import early, inputs_ready, next_may_begin
from isobatch.kernels.gpu.ptx import ex2, fma, mul
from isobatch.kernels.moe.experts import Experts
from isobatch.kernels.moe.routing import Routing, route, router_logits
from isobatch.kernels.stock import DenseStack, DenseWeight

GpuExperts = Experts[DenseWeight, DenseStack]
"""Weights of the dtype of x, contiguous."""
WIDTH_MULTIPLE = 64 if INTERPRETED else 128
"""K and I have to be multiples of it, so that no tile that serves loads beyond a row."""


@dataclass(frozen=True, slots=True)
class GroupTile:
    """How one program covers a grouped product. Nothing here can reach the order of summation.

    Args:
        rows: rows of one expert per tile.
        outputs: outputs per tile.
        depth: inputs loaded at a time.
        warps: warps per program.
        stages: loads in flight.
        weight_left: W x^T instead of x W^T.
    """

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int
    weight_left: bool = False


@triton.jit
def _product(x_rows, w, w_row, K, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
             WEIGHT_LEFT: tl.constexpr):  # fmt: skip
    """x W^T for rows at these addresses and outputs from w_row on: [ROWS, OUTPUTS]."""
    k = tl.arange(0, DEPTH)
    acc = tl.zeros((OUTPUTS, ROWS) if WEIGHT_LEFT else (ROWS, OUTPUTS), tl.float32)
    for start in range(0, K, DEPTH):
        b = w.load([w_row, start])
        if WEIGHT_LEFT:
            acc = tl.dot(b, tl.load(x_rows[None, :] + (start + k)[:, None]), acc)
        else:
            acc = tl.dot(tl.load(x_rows[:, None] + (start + k)[None, :]), b.T, acc)
    return acc.T if WEIGHT_LEFT else acc


@triton.jit
def _gate_up_kernel(
    x, w, h, tokens, ends, tile_experts, tile_rows, x_stride, INNER, K,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, WEIGHT_LEFT: tl.constexpr,
):  # fmt: skip
    """One tile of silu(gate) * up, its rows gathered from the batch."""
    inputs_ready()
    across = tl.cdiv(INNER, OUTPUTS)
    tile, n = tl.program_id(0) // across, tl.program_id(0) % across * OUTPUTS
    expert = tl.load(tile_experts + tile)
    if expert >= 0:
        row = tl.load(tile_rows + tile) + tl.arange(0, ROWS)
        mine = row < tl.load(ends + expert)
        x_rows = x + tl.load(tokens + row, mask=mine, other=0).to(tl.int64) * x_stride
        k = tl.arange(0, DEPTH)
        gate = tl.zeros((OUTPUTS, ROWS) if WEIGHT_LEFT else (ROWS, OUTPUTS), tl.float32)
        up = gate
        first = expert * 2 * INNER + n
        for start in range(0, K, DEPTH):
            g, u = w.load([first, start]), w.load([first + INNER, start])
            if WEIGHT_LEFT:
                a = tl.load(x_rows[None, :] + (start + k)[:, None])
                gate, up = tl.dot(g, a, gate), tl.dot(u, a, up)
            else:
                a = tl.load(x_rows[:, None] + (start + k)[None, :])
                gate, up = tl.dot(a, g.T, gate), tl.dot(a, u.T, up)
        next_may_begin()
        dtype = h.dtype.element_ty
        result = _silu_and_mul(gate.to(dtype), up.to(dtype))
        outputs = n + tl.arange(0, OUTPUTS)
        if WEIGHT_LEFT:
            at = h + row[None, :].to(tl.int64) * INNER + outputs[:, None]
            mask = mine[None, :] & (outputs < INNER)[:, None]
        else:
            at = h + row[:, None].to(tl.int64) * INNER + outputs[None, :]
            mask = mine[:, None] & (outputs < INNER)[None, :]
        tl.store(at, result.to(dtype), mask=mask)


@triton.jit
def _silu_and_mul(gate, up):
    """silu(gate) * up in float32, of numbers already rounded."""
    g = gate.to(tl.float32)
    e = ex2(mul(g, tl.full(g.shape, -1.4426950408889634, tl.float32)))
    return mul(tl.div_rn(g, 1.0 + e), up.to(tl.float32))


@triton.jit
def _down_kernel(
    h, w, y, ends, tile_experts, tile_rows, WIDTH, INNER,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, WEIGHT_LEFT: tl.constexpr,
):  # fmt: skip
    """One tile of the second product; its rows lie together already."""
    inputs_ready()
    across = tl.cdiv(WIDTH, OUTPUTS)
    tile, n = tl.program_id(0) // across, tl.program_id(0) % across * OUTPUTS
    expert = tl.load(tile_experts + tile)
    if expert >= 0:
        row = tl.load(tile_rows + tile) + tl.arange(0, ROWS)
        mine = row < tl.load(ends + expert)
        h_rows = h + tl.where(mine, row, 0).to(tl.int64) * INNER
        acc = _product(h_rows, w, expert * WIDTH + n, INNER, ROWS, OUTPUTS, DEPTH, WEIGHT_LEFT)
        next_may_begin()
        outputs = n + tl.arange(0, OUTPUTS)
        at = y + row[:, None].to(tl.int64) * WIDTH + outputs[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=mine[:, None] & (outputs < WIDTH)[None, :])


@triton.jit
def _combine_kernel(y, weights, rows, out, WIDTH, ACTIVE: tl.constexpr, COLUMNS: tl.constexpr):
    inputs_ready()
    next_may_begin()
    t, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS,), tl.float32)
    for s in tl.static_range(ACTIVE):
        row = tl.load(rows + t * ACTIVE + s).to(tl.int64)
        weight = tl.load(weights + t * ACTIVE + s) + tl.zeros((COLUMNS,), tl.float32)
        value = tl.load(y + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        acc = fma(weight, value, acc)
    tl.store(out + t.to(tl.int64) * WIDTH + column, acc.to(out.dtype.element_ty), mask=column < WIDTH)


def grouped(
    x: torch.Tensor, experts: GpuExperts, routing: Routing, up: GroupTile, down: GroupTile
) -> torch.Tensor:
    """Every copy of every token through its expert.

    Args:
        x: [T, K].
        experts: the weights.
        routing: where copies go; its tiles have the rows of both tile shapes.
        up: for the first product.
        down: for the second.

    Returns:
        [T A, K], rows sorted by expert.
    """
    E, width, K = experts.gate_up.dense.shape
    inner, copies, most = width // 2, len(routing.tokens), len(routing.tile_experts)
    h = torch.empty(copies, inner, dtype=x.dtype, device=x.device)
    y = torch.empty(copies, K, dtype=x.dtype, device=x.device)
    first = experts.gate_up.dense.view(E * width, K)
    gate_up = TensorDescriptor.from_tensor(first, [up.outputs, up.depth])
    _gate_up_kernel[(most * triton.cdiv(inner, up.outputs),)](
        x, gate_up, h, routing.tokens, routing.ends, routing.tile_experts, routing.tile_rows,
        x.stride(0), inner, K,
        ROWS=up.rows, OUTPUTS=up.outputs, DEPTH=up.depth, WEIGHT_LEFT=up.weight_left,
        num_warps=up.warps, num_stages=up.stages, **early(),
    )  # fmt: skip
    second = experts.down.dense.view(E * K, inner)
    down_weight = TensorDescriptor.from_tensor(second, [down.outputs, down.depth])
    _down_kernel[(most * triton.cdiv(K, down.outputs),)](
        h, down_weight, y, routing.ends, routing.tile_experts, routing.tile_rows, K, inner,
        ROWS=down.rows, OUTPUTS=down.outputs, DEPTH=down.depth, WEIGHT_LEFT=down.weight_left,
        num_warps=down.warps, num_stages=down.stages, **early(),
    )  # fmt: skip
    return y


def combine(y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Each token's results, weighted and added in ascending expert id: [T, K]."""
    T, active = routing.rows.shape
    K = y.shape[1]
    out = torch.empty(T, K, dtype=y.dtype, device=y.device)
    columns = min(1024, triton.next_power_of_2(K))
    _combine_kernel[(T, triton.cdiv(K, columns))](
        y, routing.weights, routing.rows, out, K, ACTIVE=active, COLUMNS=columns, num_warps=4, **early()
    )
    return out


def moe_tile(x: torch.Tensor, experts: GpuExperts, *, up: GroupTile, down: GroupTile) -> torch.Tensor:
    """The block, from the router to the combination, by two tile shapes.

    Args:
        x: bfloat16 or float16 [T, K], rows at any stride.
        experts: rows of whole 16-byte pieces; K and I multiples of the tiles' depth.
        up: for the first product.
        down: for the second, with as many rows.

    Returns:
        [T, K].

    Determinism:
        Row t depends on x[t] and the weights alone.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    logits = router_logits(x, experts.router.dense)
    routing = route(logits, experts.active, up.rows, renormalise=experts.renormalise)
    return combine(grouped(x, experts, routing, up, down), routing)


@dataclass(frozen=True, slots=True)
class TilePair:
    """Tiles of the two products; they share the list of tiles, so they have as many rows.

    Args:
        up: for the first.
        down: for the second.
    """

    up: GroupTile
    down: GroupTile


CANONICAL = GroupTile(16, 32, 32, 1, 1)
moe_plain = partial(moe_tile, up=CANONICAL, down=CANONICAL)

# (copies per expert, on average, up to which), the best of some thirty pairs on an H200.
_PAIRS = (
    (8, TilePair(GroupTile(16, 64, 128, 4, 5, True), GroupTile(16, 128, 128, 4, 5, True))),
    (24, TilePair(GroupTile(32, 128, 128, 8, 3, True), GroupTile(32, 128, 128, 8, 4, True))),
    (48, TilePair(GroupTile(64, 128, 64, 4, 4), GroupTile(64, 128, 64, 4, 5, True))),
)
_MANY = TilePair(GroupTile(128, 128, 64, 8, 4), GroupTile(128, 256, 64, 8, 3))
PAIRS = (*(pair for _, pair in _PAIRS), _MANY)


def moe(x: torch.Tensor, experts: GpuExperts) -> torch.Tensor:
    """The block, by the tiles that suit the number of tokens. See `moe_tile`."""
    copies = len(x) * experts.active / experts.router.outputs
    pair = next((pair for most, pair in _PAIRS if copies <= most), _MANY)
    return moe_tile(x, experts, up=pair.up, down=pair.down)
