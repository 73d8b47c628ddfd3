"""What the row-wise GPU kernels share: one fixed tree for sums, the norm's scaling, the rotation.

A sum over a row is written in single additions of two numbers each (a reduction over an axis of length two
has no order to choose), so that neither the layout that the compiler gives a tile, nor the number of warps
or of rows in it, can change its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isobatch.kernels.gpu import ptx

LANES = 1024
"""Above this width a row folds from the top, so that its far parts meet inside a thread."""
_LANES = tl.constexpr(LANES)
_TOP_FOLDS = tl.constexpr(10)
_NEIGHBOUR_FOLDS = tl.constexpr(10)


@triton.jit
def fold(x, WARPS: tl.constexpr = 1):
    """Sums of rows: [R, n] -> [R], n a power of two of at most 2^20.

    Written order: while n > 1024, s_j = s_j + s_{j + n/2}; then, to the end, s_j = s_{2j} + s_{2j+1}.

    Args:
        x: the rows.
        WARPS: that a row is shared out among: their sums come together at once, and not step by step through
            shared memory. No bit depends on it.
    """
    for _ in tl.static_range(_TOP_FOLDS):
        if x.shape[1] > _LANES:
            x = tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), 1)
    for _ in tl.static_range(_NEIGHBOUR_FOLDS):
        if x.shape[1] > WARPS:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)
    for _ in tl.static_range(_NEIGHBOUR_FOLDS):
        if x.shape[1] > 1:
            left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
            x = left + right
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def squares(x):
    """Squares of a row's elements in float32, each rounded (of 16-bit numbers they are exact)."""
    wide = x.to(tl.float32)
    return ptx.mul(wide, wide)


@triton.jit
def inverse_root_mean(total, K, eps):
    """1 / sqrt(total / K + eps), each step rounded as IEEE says."""
    return tl.div_rn(1.0, tl.sqrt_rn(ptx.add(tl.div_rn(total, K), eps + tl.zeros_like(total))))


@triton.jit
def scaled(x, scale, weight):
    """x * scale in float32, rounded to x's dtype; times the weight, rounded again."""
    unit = (x.to(tl.float32) * scale).to(x.dtype)
    return (unit.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def rotated(a, b, c, s):
    """(a c - b s, b c + a s) in float32, each product and the sum rounded apart, then rounded to a's dtype.

    All four of one shape, c and s float32.
    """
    left, right = a.to(tl.float32), b.to(tl.float32)
    first = ptx.sub(ptx.mul(left, c), ptx.mul(right, s))
    second = ptx.add(ptx.mul(right, c), ptx.mul(left, s))
    return first.to(a.dtype), second.to(a.dtype)
