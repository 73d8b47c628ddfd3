"""silu_and_mul on the GPU: 16-bit rows, float32 arithmetic, nothing summed. T rows, I outputs of a row.

Written order: e = ex2.approx(min(round(-gate * log2(e)), 126)); s = gate / (1 + e) by div.full; y = s * up,
rounded to the dtype once. torch rounds s to the dtype before the product; one rounding less is nearer to the
exact value, and nothing depends on torch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from isobatch.kernels.cpu.elementary import LOG2_E
from isobatch.kernels.gpu.overlap import early, inputs_ready, next_may_begin
from isobatch.kernels.gpu.ptx import ex2

# Beyond 2^126 div.full flushes; silu is zero to any 16-bit dtype long before.
_MOST = tl.constexpr(126.0)
_MINUS_LOG2_E = tl.constexpr(-float(LOG2_E))


@dataclass(frozen=True, slots=True)
class Piece:
    """How the work is cut.

    Args:
        columns: of a program, which takes them of one row.
        warps: of a program.
    """

    columns: int
    warps: int


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up of float32 numbers, not yet rounded to a dtype."""
    return gate / (1.0 + ex2(tl.minimum(gate * _MINUS_LOG2_E, _MOST))) * up


@triton.jit
def _silu_and_mul_kernel(
    gate_up, y, stride, WIDTH: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    inputs_ready()
    next_may_begin()
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < WIDTH
    gates = gate_up + t * stride + c // TURN * (2 * TURN) + c % TURN
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + TURN, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t * WIDTH + c, silu_times(gate, up).to(y.dtype.element_ty), mask=inside)


def silu_and_mul_cut(gate_up: torch.Tensor, *, piece: Piece, turn: int | None = None) -> torch.Tensor:
    """`silu_and_mul` in given pieces; where gates and ups take turns, of so many of each."""
    T, width = gate_up.shape[0], gate_up.shape[1] // 2
    rows = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    y = torch.empty((T, width), dtype=gate_up.dtype, device=gate_up.device)
    if T:
        _silu_and_mul_kernel[(T, triton.cdiv(width, piece.columns))](
            rows, y, rows.stride(0), WIDTH=width, TURN=turn or width, BLOCK=piece.columns,
            num_warps=piece.warps, **early(),
        )  # fmt: skip
    return y


def silu_and_mul(gate_up: torch.Tensor, turn: int | None = None) -> torch.Tensor:
    """silu of the left half of each row, times the right half.

    Args:
        gate_up: bfloat16 or float16 [T, 2 I], rows at any stride.
        turn: gates and ups take turns instead, so many of each.

    Returns:
        [T, I] of the same dtype.

    Determinism:
        Elementwise.
    """
    return silu_and_mul_cut(gate_up, piece=Piece(1024, 4), turn=turn)
