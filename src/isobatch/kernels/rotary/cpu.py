"""Rotary embedding on the CPU, float32. Nothing is summed over a row; each step is rounded on its own.

Written order, for the pair (a, b) = (x[i], x[i + D/2]) and the angle's cosine c and sine s:
a' = a * c - b * s; b' = b * c + a * s.
"""

from __future__ import annotations

import torch
from numba import prange

from isobatch.kernels.cpu.jit import array, empty, kernel


@kernel
def _rotary(x, positions, cos, sin, y):
    T, H, D = x.shape
    half = D // 2
    for t in prange(T):
        c, s = cos[positions[t]], sin[positions[t]]
        for h in range(H):
            a, b = x[t, h, :half], x[t, h, half:]
            # Two loops of one output each, so that the compiler can rule out overlaps and use vectors.
            first, second = y[t, h, :half], y[t, h, half:]
            for i in range(half):
                first[i] = a[i] * c[i] - b[i] * s[i]
            for i in range(half):
                second[i] = b[i] * c[i] + a[i] * s[i]


def rotary(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x turned by its position's angles."""
    out, out_array = empty(*x.shape)
    launch = _rotary.sized(x.numel())
    launch(array(x), array(positions), array(cos), array(sin), out_array)
    return out
