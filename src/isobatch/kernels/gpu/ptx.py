"""Single float32 operations that the compiler may neither contract nor replace.

Triton contracts a multiplication and an addition into one fused step where it sees them side by side. Where a
written order rounds them apart, or fuses them, it says so with these. Subnormal numbers are flushed, as the
vendor's attention does, but by `add_ieee` and `rescale`.
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


def _unless_one(count: int) -> str:
    """Multiplies `count` numbers in place, unless the warp's factors are all one."""
    first = 2 * count  # of the factors; a thread's first and third are its two rows'
    products = " ".join(f"mul.f32 ${i}, ${i}, ${first + i};" for i in range(count))
    return f"""
        {{
            .reg .pred one, all;
            setp.eq.f32 one, ${first}, 0f3F800000;
            setp.eq.and.f32 one, ${first + 2}, 0f3F800000, one;
            vote.sync.all.pred all, one, 0xffffffff;
            @all bra DONE;
            {products}
            DONE:
        }}
        """


def _in_place(count: int) -> str:
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


_UNLESS_ONE_32, _IN_PLACE_32 = tl.constexpr(_unless_one(32)), tl.constexpr(_in_place(32))
_UNLESS_ONE_64, _IN_PLACE_64 = tl.constexpr(_unless_one(64)), tl.constexpr(_in_place(64))


@triton.jit
def rescale(acc, factors, COUNT: tl.constexpr):
    """Acc * factors; a warp whose factors are all one leaves its rows as they are, which is the same.

    Args:
        acc: float32, an accumulator of a warp group: a thread has COUNT numbers, of two rows, by pairs.
        factors: float32, one for each row.
        COUNT: 32 or 64.
    """
    if _PLAIN:
        return acc * factors
    if COUNT == 32:
        return tl.inline_asm_elementwise(
            _UNLESS_ONE_32, _IN_PLACE_32, [acc, factors], dtype=tl.float32, is_pure=False, pack=32
        )
    return tl.inline_asm_elementwise(
        _UNLESS_ONE_64, _IN_PLACE_64, [acc, factors], dtype=tl.float32, is_pure=False, pack=64
    )
