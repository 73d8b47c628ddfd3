"""RMS norm on the GPU: 16-bit rows, float32 arithmetic. Shape letters: T rows, K width.

Written order: with a residual, x = x + residual in float32, rounded to the rows' dtype first, as models add
it; what is normalised is that rounded sum. The squares, padded with zeros to the next power of two, are added
by the tree of `kernels.gpu.rows.fold`, which depends on K alone. r = 1 / sqrt(sum / K + eps), each step
rounded as IEEE says; y = round(round(x * r) * w), rounded to the dtype twice, as transformers' LlamaRMSNorm
has it: models were trained and are compared with that.

How many rows and warps a program has is free: no bit depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from isobatch.kernels.gpu.overlap import ask_ahead, early, inputs_ready, next_may_begin
from isobatch.kernels.gpu.rows import fold, inverse_root_mean, scaled, squares

_LINE = tl.constexpr(64)  # numbers of a line of the second-level cache


@dataclass(frozen=True, slots=True)
class Tile:
    """How the work is cut.

    Args:
        rows: of a program.
        warps: of a program.
    """

    rows: int
    warps: int


@triton.jit(do_not_specialize=["T"])
def _rms_norm_kernel(
    x,
    residual,
    weight,
    y,
    total,
    T,
    eps,
    x_stride,
    residual_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    if tl.program_id(0) == 0:
        ask_ahead(weight + tl.minimum(tl.arange(0, (BLOCK + _LINE - 1) // _LINE) * _LINE, K - 1))
    inputs_ready()
    next_may_begin()
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = (r < T) & (c < K)
    row = tl.load(x + r * x_stride + c, mask=inside, other=0.0)
    w = tl.load(weight + c, mask=c < K, other=0.0)
    if RESIDUAL:
        other = tl.load(residual + r * residual_stride + c, mask=inside, other=0.0)
        row = (row.to(tl.float32) + other.to(tl.float32)).to(row.dtype)
        tl.store(total + r * K + c, row, mask=inside)
    scale = inverse_root_mean(fold(squares(row), WARPS), K * 1.0, eps)
    tl.store(y + r * K + c, scaled(row, scale[:, None], w), mask=inside)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def rms_norm_tiled(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` by a given tile."""
    T, K = x.shape
    x = _rows(x)
    y = torch.empty((T, K), dtype=x.dtype, device=x.device)
    total, other = x, x
    if residual is not None:
        other, total = _rows(residual), torch.empty_like(y)
    if T:
        _rms_norm_kernel[(triton.cdiv(T, tile.rows),)](
            x,
            other,
            weight,
            y,
            total,
            T,
            eps,
            x.stride(0),
            other.stride(0),
            K=K,
            BLOCK=triton.next_power_of_2(K),
            ROWS=tile.rows,
            WARPS=tile.warps if tile.rows == 1 else 1,
            RESIDUAL=residual is not None,
            num_warps=tile.warps,
            **early(),
        )
    return y, total


MANY = 128
"""Rows from which a program takes several narrow ones."""


def tile_for(rows: int, width: int) -> Tile:
    """The certified tile that serves: whole rows, at most four warps."""
    block = triton.next_power_of_2(width)
    # More than four warps share the lanes of the tree, and pay for it.
    warps = min(4, max(1, block // 512))
    if block <= 1024 and rows >= MANY:
        return Tile(2048 // max(block, 128), 4 if block < 1024 else 2)
    return Tile(1, warps)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows, and the rows that were normalised (x, or x + residual).

    Args:
        x: bfloat16 or float16 [T, K], rows at any stride.
        weight: of the same dtype [K], contiguous.
        eps: added to the mean square.
        residual: like x, or None.

    Returns:
        Two tensors like x; without a residual the second is x itself.

    Determinism:
        Row t depends on row t of the inputs alone.
    """
    return rms_norm_tiled(x, weight, eps, residual, tile=tile_for(*x.shape))
