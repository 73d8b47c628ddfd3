"""Elementary functions for GPU kernels: the CPU's own, operation by operation, so that both give equal bits.

Only additions, multiplications and divisions as IEEE rounds them. Launch kernels that use these with
**UNFUSED: a contraction would give other bits than the CPU's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isobatch.kernels.cpu import elementary as cpu

UNFUSED = {"enable_fp_fusion": False}
"""Launch option: no multiplication is contracted with the addition after it."""

LOG2_E = tl.constexpr(float(cpu.LOG2_E))
_ROUND, _ROUND_BITS = tl.constexpr(float(cpu._ROUND)), tl.constexpr(int(cpu._ROUND_BITS))
_E0, _E1, _E2, _E3, _E4, _E5, _E6, _E7 = (
    tl.constexpr(float(e)) for e in (cpu._E0, cpu._E1, cpu._E2, cpu._E3, cpu._E4, cpu._E5, cpu._E6, cpu._E7)
)
_MANTISSA, _ONE_BITS = tl.constexpr(int(cpu._MANTISSA)), tl.constexpr(int(cpu._ONE_BITS))
_SQRT2, _LN2 = tl.constexpr(cpu._SQRT2), tl.constexpr(cpu._LN2)
_A0, _A1, _A2, _A3, _A4, _A5, _A6, _A7, _A8, _A9, _A10, _A11 = (tl.constexpr(a) for a in cpu._A)


@triton.jit
def exp2(x):
    """2^x in float32: zero below -126.5, infinity above 127.5, NaN for NaN."""
    x = tl.where(x > 128.0, 128.0, x)
    x = tl.where(x < -127.0, -127.0, x)
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)
    p = f * _E7 + _E6
    p = p * f + _E5
    p = p * f + _E4
    p = p * f + _E3
    p = p * f + _E2
    p = p * f + _E1
    p = p * f + _E0
    exponent = shifted.to(tl.int32, bitcast=True) - _ROUND_BITS + 127
    return p * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def log(x):
    """ln(x) in float64 for finite normal x > 0."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) - 1023
    m = ((bits & _MANTISSA) | _ONE_BITS).to(tl.float64, bitcast=True)
    high = m > _SQRT2
    m = tl.where(high, m * 0.5, m)
    exponent = tl.where(high, exponent + 1, exponent)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = z * _A11 + _A10
    p = p * z + _A9
    p = p * z + _A8
    p = p * z + _A7
    p = p * z + _A6
    p = p * z + _A5
    p = p * z + _A4
    p = p * z + _A3
    p = p * z + _A2
    p = p * z + _A1
    p = p * z + _A0
    return p * s + exponent.to(tl.float64) * _LN2


LOWEST = tl.constexpr(-(2**31))
"""Below the key of every float: stands for "none"."""


@triton.jit
def ordered(x):
    """Float32 as int32 keys in the same order; the two zeros share a key, NaN lie beyond infinity."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def from_ordered(key):
    """The float32 of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
