"""Linear on the GPU, bfloat16 and float16: y = x W^T (+ bias), or silu(gate) * up of a pair of outputs.

Written order: per output one float32 accumulator, from zero; k ascending in tensor-core steps of 16; then the
bias, one rounded float32 addition; then one rounding to the dtype of the result. K is never split. Gates and
ups are so rounded, and then joined as `silu_and_mul` joins them (kernels/activation/triton.py).

What a tensor core does inside its step is the architecture's, and a function of the sixteen products and the
accumulator alone. So tiles of any shape, both operand orders, `mma.sync` and `wgmma`, any pipeline, and a
library's kernels that do not split K, are candidates for one bit class. None is trusted: each is certified.

Shape letters: M rows of x, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from isobatch.kernels.activation.triton import silu_times
from isobatch.kernels.gpu.device import multiprocessors
from isobatch.kernels.gpu.overlap import ask_for, early, inputs_ready, next_may_begin, overlaps
from isobatch.kernels.gpu.paired import TURN, PairedWeight
from isobatch.kernels.stock import DenseWeight

_TMA_ALIGNMENT = 16
_STAGED = 128 * 128  # numbers of a tile that go out through shared memory at once
_FEW_ROWS = 64  # tiles with more rows keep the tensor cores busy, not the memory
_AHEAD_BYTES = 1 << 16  # of weights that a program asks for before its inputs are ready
_TURN = tl.constexpr(TURN)


@dataclass(frozen=True, slots=True)
class Tile:
    """How one program covers the product. Nothing here can reach the order of summation.

    Args:
        rows: rows of x per tile.
        outputs: outputs per tile.
        depth: inputs loaded at a time.
        warps: warps per program.
        stages: loads in flight.
        weight_left: W x^T instead of x W^T, so that few rows lie along the tensor core's narrow side.
        tma: tiles come by the bulk copy engine; otherwise by ordinary asynchronous copies.
        resident: programs per multiprocessor that loop over the tiles; 0 for a program per tile.
    """

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int
    weight_left: bool = False
    tma: bool = False
    resident: int = 0

    @property
    def name(self) -> str:
        """Compact, unique, and readable in a plan file."""
        flags = ("w" if self.weight_left else "") + ("t" if self.tma else "")
        loop = f"p{self.resident}" if self.resident else ""
        return f"{self.rows}x{self.outputs}x{self.depth}.{self.warps}.{self.stages}{flags}{loop}"


@triton.jit
def _tile_at(tile, M, N, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr):
    """The first row and output of a tile; tiles that share rows and outputs are near each other in time."""
    tall, wide = tl.cdiv(M, ROWS), tl.cdiv(N, OUTPUTS)
    per_group = GROUP * wide
    first = tile // per_group * GROUP
    height = min(tall - first, GROUP)
    row = first + tile % per_group % height
    output = tile % per_group // height
    return row * ROWS, output * OUTPUTS


@triton.jit
def _weights_ahead(w, n, N, w_stride, OUTPUTS: tl.constexpr, SHARE: tl.constexpr, BYTES: tl.constexpr):
    """Asks the second-level cache for the first BYTES of each weight row of a tile, SHARE threads for each.

    Weights are there before the inputs are: what the memory would do meanwhile is nothing. Threads side by
    side share a row, for then a warp asks for fewer.
    """
    if SHARE:
        i = tl.arange(0, OUTPUTS * SHARE)
        output = tl.minimum(n + i // SHARE, N - 1)
        at = (w + output.to(tl.int64) * w_stride).to(tl.int64)
        ask_for(at, tl.full((OUTPUTS * SHARE,), BYTES, tl.int32))


@triton.jit
def _joined(acc, dtype: tl.constexpr, WEIGHT_LEFT: tl.constexpr):
    """silu(gate) * up of a tile's outputs, of which gates and ups take turns: half as many. `wgmma` leaves
    both to one thread, so nothing moves."""
    rounded = acc.to(dtype).to(tl.float32)
    if WEIGHT_LEFT:
        half: tl.constexpr = acc.shape[0] // 2
        turns = rounded.reshape(half // _TURN, 2, _TURN, acc.shape[1]).permute(0, 2, 3, 1)
        gate, up = turns.split()
        joined = silu_times(gate, up).reshape(half, acc.shape[1])
    else:
        wide: tl.constexpr = acc.shape[1] // 2
        gate, up = rounded.reshape(acc.shape[0], wide // _TURN, 2, _TURN).permute(0, 1, 3, 2).split()
        joined = silu_times(gate, up).reshape(acc.shape[0], wide)
    return joined


@triton.jit
def _store(y, bias, acc, m, n, M, N, y_stride, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
           WEIGHT_LEFT: tl.constexpr, BIASED: tl.constexpr):  # fmt: skip
    rows, outputs = m + tl.arange(0, ROWS), n + tl.arange(0, OUTPUTS)
    if BIASED:
        b = tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)
        acc = acc + (b[:, None] if WEIGHT_LEFT else b[None, :])
    if WEIGHT_LEFT:
        at = y + rows[None, :].to(tl.int64) * y_stride + outputs[:, None]
        mask = (rows < M)[None, :] & (outputs < N)[:, None]
    else:
        at = y + rows[:, None].to(tl.int64) * y_stride + outputs[None, :]
        mask = (rows < M)[:, None] & (outputs < N)[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _linear_pointer_kernel(
    x, w, bias, y, M, N, K, x_stride, w_stride, y_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr, WHOLE: tl.constexpr,
    SHARE: tl.constexpr, BYTES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One tile by ordinary copies: any strides, any N and K."""
    m, n = _tile_at(tl.program_id(0), M, N, ROWS, OUTPUTS, GROUP)
    _weights_ahead(w, n, N, w_stride, OUTPUTS, SHARE, BYTES)
    inputs_ready()
    if AT_ONCE:
        next_may_begin()
    rows, outputs, k = m + tl.arange(0, ROWS), n + tl.arange(0, OUTPUTS), tl.arange(0, DEPTH)
    # Beyond the edge output 0 is read again: cheaper than a mask, and never stored. Not so row 0: of a single
    # row all programs would ask the same few places for sixteen copies, at the same time.
    x_rows = x + tl.where(rows < M, rows, 0).to(tl.int64) * x_stride
    w_rows = w + tl.where(outputs < N, outputs, 0).to(tl.int64) * w_stride
    acc = tl.zeros((OUTPUTS, ROWS) if WEIGHT_LEFT else (ROWS, OUTPUTS), tl.float32)
    for start in range(0, K, DEPTH):
        # Beyond K there are products of zeros, which change no accumulator.
        at = start + k
        xs = tl.load(
            x_rows[:, None] + at[None, :],
            mask=(rows < M)[:, None] if WHOLE else (rows < M)[:, None] & (at < K)[None, :],
            other=0.0,
        )
        if WHOLE:
            ws = tl.load(w_rows[:, None] + at[None, :])
        else:
            ws = tl.load(w_rows[:, None] + at[None, :], mask=(at < K)[None, :], other=0.0)
        acc = tl.dot(ws, xs.T, acc) if WEIGHT_LEFT else tl.dot(xs, ws.T, acc)
    if not AT_ONCE:
        next_may_begin()
    if GATED:
        pairs = _joined(acc, y.dtype.element_ty, WEIGHT_LEFT)
        _store(y, bias, pairs, m, n // 2, M, N // 2, y_stride, ROWS, OUTPUTS // 2, WEIGHT_LEFT, BIASED)
    else:
        _store(y, bias, acc, m, n, M, N, y_stride, ROWS, OUTPUTS, WEIGHT_LEFT, BIASED)


@triton.jit
def _store_tiles(y, bias, acc, m, n, N, OUTPUTS: tl.constexpr, PARTS: tl.constexpr, BIASED: tl.constexpr):
    """Stores [ROWS, OUTPUTS] in PARTS pieces side by side, since a wide tile leaves little shared memory."""
    if PARTS == 1:
        if BIASED:
            outputs = n + tl.arange(0, OUTPUTS)
            acc = acc + tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
        y.store([m, n], acc.to(y.dtype))
    else:
        half: tl.constexpr = OUTPUTS // 2
        left, right = acc.reshape(acc.shape[0], 2, half).permute(0, 2, 1).split()
        _store_tiles(y, bias, left, m, n, N, half, PARTS // 2, BIASED)
        _store_tiles(y, bias, right, m, n + half, N, half, PARTS // 2, BIASED)


@triton.jit(do_not_specialize=["M"])
def _linear_tma_kernel(
    x, w, weights, bias, y, M, N, K, w_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr,
    ONCE: tl.constexpr, SHARE: tl.constexpr, BYTES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Tiles by the bulk copy engine, which fills with zeros beyond the edges and stores nothing there.

    x, w and y are what that engine reads; `weights` is the address of w. ONCE: a program has one tile.
    """
    if SHARE:
        _, first = _tile_at(tl.program_id(0), M, N, ROWS, OUTPUTS, GROUP)
        _weights_ahead(weights, first, N, w_stride, OUTPUTS, SHARE, BYTES)
    inputs_ready()
    if AT_ONCE:
        next_may_begin()
    tiles = tl.cdiv(M, ROWS) * tl.cdiv(N, OUTPUTS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = _tile_at(tile, M, N, ROWS, OUTPUTS, GROUP)
        acc = tl.zeros((OUTPUTS, ROWS) if WEIGHT_LEFT else (ROWS, OUTPUTS), tl.float32)
        for start in range(0, K, DEPTH):
            a, b = x.load([m, start]), w.load([n, start])
            acc = tl.dot(b, a.T, acc) if WEIGHT_LEFT else tl.dot(a, b.T, acc)
        if ONCE and not AT_ONCE:
            next_may_begin()
        if GATED:
            pairs = _joined(acc, y.dtype, WEIGHT_LEFT)
            pairs = pairs.T if WEIGHT_LEFT else pairs
            _store_tiles(y, bias, pairs, m, n // 2, N // 2, OUTPUTS // 2, PARTS, BIASED)
        else:
            _store_tiles(y, bias, acc.T if WEIGHT_LEFT else acc, m, n, N, OUTPUTS, PARTS, BIASED)


def bulk_copyable(tensor: torch.Tensor) -> bool:
    """Whether the bulk copy engine can read a matrix: rows of whole 16-byte pieces, aligned."""
    step = tensor.stride(0) * tensor.element_size()
    inner = tensor.stride(1) == 1 and tensor.shape[1] * tensor.element_size() % _TMA_ALIGNMENT == 0
    return inner and step % _TMA_ALIGNMENT == 0 and tensor.data_ptr() % _TMA_ALIGNMENT == 0


def _bytes_ahead(w: torch.Tensor, tile: Tile) -> tuple[int, int]:
    """How many threads of a program ask for each weight row, and for how many bytes of it; or none."""
    if not overlaps() or tile.rows > _FEW_ROWS or not bulk_copyable(w):
        return 0, 0
    # Whole lines of the cache, and the same for every K that is no smaller.
    size = min(_AHEAD_BYTES // tile.outputs, w.shape[1] * w.element_size()) // 128 * 128
    return (max(1, 32 * tile.warps // tile.outputs), size) if size else (0, 0)


def linear_tile(
    x: torch.Tensor,
    weight: DenseWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    tile: Tile,
    small_next: bool = False,
) -> torch.Tensor:
    """The product by one tile shape.

    Args:
        x: bfloat16 or float16 [M, K], rows at any stride.
        weight: the same dtype, [N, K].
        bias: the same dtype [N], or None.
        out_dtype: of the result; x's own by default, float32 for logits.
        tile: how. A shape that the bulk copy engine cannot serve goes by ordinary copies.
        small_next: whether the kernel after it is a small one, which may take its places at once; one that
            fills the GPU would be spread unevenly, and is let in when this one's loads are done.

    Returns:
        [M, N], contiguous.
    """
    y = torch.empty(len(x), weight.outputs, dtype=out_dtype or x.dtype, device=x.device)
    return _launched(x, weight.dense, bias, y, tile, small_next=small_next)


def gated_tile(x: torch.Tensor, weight: PairedWeight, *, tile: Tile) -> torch.Tensor:
    """silu(x gates^T) * x ups^T by one tile shape, in one kernel.

    Args:
        x: bfloat16 or float16 [M, K], rows at any stride.
        weight: the same dtype, [2 I, K].
        tile: how, as for `linear_tile`; it covers gates and ups, and stores half as many outputs.

    Returns:
        [M, I], contiguous.
    """
    y = torch.empty(len(x), weight.outputs // 2, dtype=x.dtype, device=x.device)
    return _launched(x, weight.turns.dense, None, y, tile, gated=True)


def _launched(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    tile: Tile,
    *,
    gated: bool = False,
    small_next: bool = False,
) -> torch.Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    (M, K), N = x.shape, w.shape[0]
    tiles = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.outputs)
    programs = min(tiles, tile.resident * multiprocessors()) if tile.resident else tiles
    shape = {
        "ROWS": tile.rows,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
        "GROUP": 8,
        "WEIGHT_LEFT": tile.weight_left,
        "BIASED": bias is not None,
        "GATED": gated,
        "AT_ONCE": small_next and tile.rows <= _FEW_ROWS,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **early(),
    }
    shape["SHARE"], shape["BYTES"] = _bytes_ahead(w, tile)
    if tile.tma and bulk_copyable(x) and bulk_copyable(w) and bulk_copyable(y):
        x_tiles = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth])
        w_tiles = TensorDescriptor.from_tensor(w, [tile.outputs, tile.depth])
        outputs = tile.outputs // 2 if gated else tile.outputs
        parts = max(1, tile.rows * outputs // _STAGED)
        y_tiles = TensorDescriptor.from_tensor(y, [tile.rows, outputs // parts])
        _linear_tma_kernel[(programs,)](
            x_tiles, w_tiles, w, bias, y_tiles, M, N, K, w.stride(0), **shape, PARTS=parts,
            ONCE=not tile.resident,
        )  # fmt: skip
    else:
        strides = x.stride(0), w.stride(0), y.stride(0)
        whole = K % tile.depth == 0
        _linear_pointer_kernel[(tiles,)](x, w, bias, y, M, N, K, *strides, **shape, WHOLE=whole)
    return y


CANONICAL = Tile(rows=16, outputs=32, depth=64, warps=1, stages=1)
linear_plain = partial(linear_tile, tile=CANONICAL)
