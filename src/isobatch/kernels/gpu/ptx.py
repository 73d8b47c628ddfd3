"""Single float32 operations that the compiler may neither contract nor replace.

Triton contracts a multiplication and an addition into one fused step where it sees them side by side. Where a
written order rounds them apart, or fuses them, it says so with these. Subnormal numbers are flushed, as the
vendor's attention does, but by `add_ieee`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isobatch.kernels.gpu.device import INTERPRETED

# Inline assembly is not interpreted; NumPy contracts nothing, so there the plain operators are right.
_PLAIN = tl.constexpr(INTERPRETED)


@triton.jit
def ex2(x):
    """2 ** x, approximately: the hardware's own instruction."""
    if _PLAIN:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def mul(x, y):
    """X * y, rounded."""
    if _PLAIN:
        return x * y
    return tl.inline_asm_elementwise(
        "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def add(x, y):
    """X + y, rounded."""
    if _PLAIN:
        return x + y
    return tl.inline_asm_elementwise(
        "add.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def add_ieee(x, y):
    """X + y, rounded, subnormal numbers kept."""
    if _PLAIN:
        return x + y
    return tl.inline_asm_elementwise(
        "add.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sub(x, y):
    """X - y, rounded."""
    if _PLAIN:
        return x - y
    return tl.inline_asm_elementwise(
        "sub.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def fma(x, y, z):
    """X * y + z with one rounding."""
    if _PLAIN:
        return x * y + z
    return tl.inline_asm_elementwise(
        "fma.rn.ftz.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=True, pack=1
    )
