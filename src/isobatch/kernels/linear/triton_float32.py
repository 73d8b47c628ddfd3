"""Linear on the GPU in float32, IEEE throughout and never TF32: y = x W^T (+ bias).

Written order: k ascending in blocks of 32; within a block one chain of fused multiply-adds from zero; blocks
are added in order, from zero, one rounded addition each; then the bias, one more. One chain over all of K
would be several times further from the exact sum than torch's products. The ordinary units do it:
tensor cores would round both operands to ten bits.

Shape letters: M rows of x, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from isobatch.kernels.gpu.overlap import early, inputs_ready, next_may_begin
from isobatch.kernels.gpu.ptx import add_ieee
from isobatch.kernels.stock import DenseWeight

_BLOCK = tl.constexpr(32)


@dataclass(frozen=True, slots=True)
class Tile:
    """How one program covers the product. Nothing here can reach the order of summation.

    Args:
        rows: rows of x per tile.
        outputs: outputs per tile.
        warps: warps per program.
        plain: whether inputs are taken one by one, which is canonical, or a block at a time.
    """

    rows: int
    outputs: int
    warps: int
    plain: bool = False


@triton.jit(do_not_specialize=["M"])
def _linear_float32_kernel(
    x, w, bias, y, M, N, K, x_stride, w_stride,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, PLAIN: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    inputs_ready()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    x_rows = x + tl.where(rows < M, rows, 0).to(tl.int64) * x_stride
    w_rows = w + tl.where(outputs < N, outputs, 0).to(tl.int64) * w_stride
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    zeros = acc
    for start in range(0, K, _BLOCK):
        if PLAIN:
            block = zeros
            for k in range(start, tl.minimum(start + _BLOCK, K)):
                a = tl.broadcast_to(tl.load(x_rows + k)[:, None], (ROWS, OUTPUTS))
                b = tl.broadcast_to(tl.load(w_rows + k)[None, :], (ROWS, OUTPUTS))
                block = tl.fma(a, b, block)
        else:
            at = start + tl.arange(0, _BLOCK)
            # Products of zeros beyond K change no sum.
            a = tl.load(x_rows[:, None] + at[None, :], mask=(at < K)[None, :], other=0.0)
            b = tl.load(w_rows[None, :] + at[:, None], mask=(at < K)[:, None], other=0.0)
            block = tl.dot(a, b, zeros, input_precision="ieee")
        # In assembly, since the compiler would draw a plain sum into the chain of products before it.
        acc = add_ieee(acc, block)
    if BIASED:
        b = tl.load(bias + outputs, mask=outputs < N, other=0.0)
        acc = add_ieee(acc, tl.broadcast_to(b[None, :], (ROWS, OUTPUTS)))
    next_may_begin()
    at = y + rows[:, None].to(tl.int64) * N + outputs[None, :]
    tl.store(at, acc, mask=(rows < M)[:, None] & (outputs < N)[None, :])


def linear_float32_tile(
    x: torch.Tensor, weight: DenseWeight, bias: torch.Tensor | None = None, *, tile: Tile
) -> torch.Tensor:
    """`linear_float32` by one tile shape."""
    w = weight.dense
    x = x if x.stride(1) == 1 else x.contiguous()
    (M, K), N = x.shape, w.shape[0]
    y = torch.empty(M, N, dtype=torch.float32, device=x.device)
    if M:
        _linear_float32_kernel[(triton.cdiv(M, tile.rows), triton.cdiv(N, tile.outputs))](
            x, w, bias, y, M, N, K, x.stride(0), w.stride(0),
            ROWS=tile.rows, OUTPUTS=tile.outputs, PLAIN=tile.plain, BIASED=bias is not None,
            num_warps=tile.warps, **early(),
        )  # fmt: skip
    return y


CANONICAL = Tile(rows=1, outputs=32, warps=1, plain=True)
FEW, MANY = Tile(rows=16, outputs=32, warps=4), Tile(rows=64, outputs=64, warps=4)
_FEW_ROWS = 32


def linear_float32(x: torch.Tensor, weight: DenseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product, by the tile that suits the number of rows.

    Args:
        x: float32 [M, K], on the device, rows at any stride.
        weight: float32 [N, K].
        bias: float32 [N], or None.

    Returns:
        float32 [M, N], contiguous.

    Determinism:
        Row m depends on x[m], the weight and the bias alone; no flag of torch's is heeded.
    """
    return linear_float32_tile(x, weight, bias, tile=FEW if len(x) <= _FEW_ROWS else MANY)
