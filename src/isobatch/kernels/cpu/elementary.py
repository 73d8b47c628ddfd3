"""Elementary functions in plain arithmetic: no libm, whose last bit differs between machines.

Only IEEE add, subtract, multiply, divide and integer operations, each rounded on its own, in the order
written. So the same bits on every CPU. The compiled ones serve kernels; the NumPy ones build tables at load,
where every ufunc is one rounded operation.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from isobatch.kernels.cpu.jit import device

# In hexadecimal, because a constant computed at import would come from libm.
LOG2_E64 = float.fromhex("0x1.71547652b82fep+0")
LOG2_E = np.float32(LOG2_E64)
_LN2 = float.fromhex("0x1.62e42fefa39efp-1")


def _bitcast(source, target, target_ir):
    @intrinsic
    def cast(_typing, value):
        return target(source), lambda _c, builder, _s, args: builder.bitcast(args[0], target_ir)

    return cast


_bits32 = _bitcast(types.float32, types.int32, ir.IntType(32))
_float32 = _bitcast(types.int32, types.float32, ir.FloatType())
_bits64 = _bitcast(types.float64, types.int64, ir.IntType(64))
_float64 = _bitcast(types.int64, types.float64, ir.DoubleType())

# Adding 1.5 * 2^23 leaves a float32's nearest integer in the low bits of the sum.
_ROUND = np.float32(12582912.0)
_ROUND_BITS = np.int32(0x4B400000)
# 2^f for f in [-1/2, 1/2]: the Taylor coefficients ln(2)^n / n!, error below half an ulp of float32.
_E0, _E1, _E2, _E3, _E4, _E5, _E6, _E7 = (
    np.float32(math.prod([_LN2] * n, start=1.0) / math.factorial(n)) for n in range(8)
)


@device
def exp2(x):
    """2^x in float32: zero below -126.5, infinity above 127.5, NaN for NaN."""
    one_step_past = np.float32(128.0)
    x = one_step_past if x > one_step_past else x
    x = np.float32(-127.0) if x < np.float32(-127.0) else x
    shifted = x + _ROUND
    f = x - (shifted - _ROUND)
    p = _E7 * f + _E6
    p = p * f + _E5
    p = p * f + _E4
    p = p * f + _E3
    p = p * f + _E2
    p = p * f + _E1
    p = p * f + _E0
    exponent = np.int32(_bits32(shifted) - _ROUND_BITS + np.int32(127))
    return p * _float32(np.int32(exponent << np.int32(23)))


# ln 2 in two parts: an exponent of 8 bits times the first, of 15 bits, is exact in float32.
_LN2_HIGH = np.float32(0.693145751953125)
_LN2_LOW = np.float32(_LN2 - 0.693145751953125)
# e^f for f in [-ln(2)/2, ln(2)/2]: 1 / n!.
_F2, _F3, _F4, _F5, _F6, _F7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))


@device
def exp(x):
    """e^x in float32 within 2 ulp: zero below -87.7, infinity above 88.3, NaN for NaN."""
    x = np.float32(89.0) if x > np.float32(89.0) else x
    x = np.float32(-88.0) if x < np.float32(-88.0) else x
    shifted = x * LOG2_E + _ROUND
    n = shifted - _ROUND
    f = x - n * _LN2_HIGH
    f = f - n * _LN2_LOW
    p = _F7 * f + _F6
    p = p * f + _F5
    p = p * f + _F4
    p = p * f + _F3
    p = p * f + _F2
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    exponent = np.int32(_bits32(shifted) - _ROUND_BITS + np.int32(127))
    return p * _float32(np.int32(exponent << np.int32(23)))


_MANTISSA = np.int64((1 << 52) - 1)
_ONE_BITS = np.int64(1023 << 52)
_SQRT2 = float.fromhex("0x1.6a09e667f3bcdp+0")
_A = tuple(2.0 / (2 * n + 1) for n in range(12))


@device
def log(x):
    """ln(x) in float64 for finite normal x > 0, within 2 ulp: the series of 2 atanh((m-1)/(m+1))."""
    bits = _bits64(x)
    exponent = np.int64(bits >> np.int64(52)) - np.int64(1023)
    m = _float64(np.int64((bits & _MANTISSA) | _ONE_BITS))
    if m > _SQRT2:
        m = m * 0.5
        exponent += np.int64(1)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = _A[11]
    p = p * z + _A[10]
    p = p * z + _A[9]
    p = p * z + _A[8]
    p = p * z + _A[7]
    p = p * z + _A[6]
    p = p * z + _A[5]
    p = p * z + _A[4]
    p = p * z + _A[3]
    p = p * z + _A[2]
    p = p * z + _A[1]
    p = p * z + _A[0]
    return p * s + np.float64(exponent) * _LN2


# pi/2 in three parts of 33 bits: an integer below 2^20 times a part is exact in float64.
_PIO2 = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624871116645580e-21)


def sin_cos(angle: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sine and cosine, accurate far beyond float32.

    Args:
        angle: float64, any shape, radians, magnitude below 2^20.

    Returns:
        (sin, cos), float64, the same shape.

    Determinism:
        Elementwise, each step one IEEE operation: the same bits on every CPU.
    """
    quadrant = np.rint(angle * (2.0 / math.pi))
    r = angle - quadrant * _PIO2[0]
    r = r - quadrant * _PIO2[1]
    r = r - quadrant * _PIO2[2]
    z = r * r
    sin, cos = np.zeros_like(r), np.zeros_like(r)
    for n in range(9, -1, -1):
        sin = sin * z + (-1.0) ** n / math.factorial(2 * n + 1)
        cos = cos * z + (-1.0) ** n / math.factorial(2 * n)
    sin = sin * r
    q = quadrant.astype(np.int64) & 3
    swap = (q & 1) == 1
    return (
        np.where(swap, cos, sin) * np.where(q >= 2, -1.0, 1.0),
        np.where(swap, sin, cos) * np.where((q == 1) | (q == 2), -1.0, 1.0),
    )


def power(base: float, numerator: int, denominator: int) -> float:
    """base ** (numerator / denominator), correctly rounded to float64 by decimal arithmetic."""
    context = Context(prec=60)
    exponent = context.divide(Decimal(numerator), Decimal(denominator))
    return float(context.power(Decimal(base), exponent))
