"""Rotary embedding on the GPU: 16-bit heads, float32 arithmetic. T rows, H heads, D head size, C context.

Written order, for the pair (a, b) = (x[i], x[i + D/2]) and the angle's float32 cosine c and sine s:
a' = a * c - b * s; b' = b * c + a * s. Each product and the sum rounded apart in float32, then to the dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from isobatch.kernels.gpu.overlap import early, inputs_ready, next_may_begin
from isobatch.kernels.gpu.rows import rotated


@triton.jit
def _rotary_kernel(
    x,
    positions,
    cos,
    sin,
    y,
    x_stride,
    head_stride,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inputs_ready()
    next_may_begin()
    t = tl.program_id(0).to(tl.int64)
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    c = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (HEADS, BLOCK))
    inside = (h < H) & (c < HALF)
    position = tl.load(positions + t)
    at = x + t * x_stride + h * head_stride + c
    a = tl.load(at, mask=inside, other=0.0)
    b = tl.load(at + HALF, mask=inside, other=0.0)
    # Loaded for each head, from the nearest cache: so it lies where it is needed.
    angle = position * HALF + c
    cosine = tl.load(cos + angle, mask=c < HALF, other=0.0)
    sine = tl.load(sin + angle, mask=c < HALF, other=0.0)
    first, second = rotated(a, b, cosine, sine)
    out = y + (t * H + h) * (2 * HALF) + c
    tl.store(out, first, mask=inside)
    tl.store(out + HALF, second, mask=inside)


def rotary_tiled(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, heads: int, warps: int
) -> torch.Tensor:
    """`rotary` with `heads` heads (a power of two) and `warps` warps to a program."""
    T, H, D = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    y = torch.empty((T, H, D), dtype=x.dtype, device=x.device)
    if T:
        _rotary_kernel[(T, triton.cdiv(H, heads))](
            x,
            positions.contiguous(),
            cos,
            sin,
            y,
            x.stride(0),
            x.stride(1),
            H=H,
            HALF=D // 2,
            HEADS=heads,
            BLOCK=triton.next_power_of_2(D // 2),
            num_warps=warps,
            **early(),
        )
    return y


def rotary(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x turned by its position's angles.

    Args:
        x: bfloat16 or float16 [T, H, D], rows and heads at any stride.
        positions: int64 [T], each below C.
        cos: float32 [C, D/2], contiguous.
        sin: likewise.

    Returns:
        [T, H, D] of x's dtype, contiguous.

    Determinism:
        Row t depends on x[t] and positions[t] alone.
    """
    heads = min(32, triton.next_power_of_2(x.shape[1]))
    return rotary_tiled(x, positions, cos, sin, heads=heads, warps=max(1, heads // 8))
