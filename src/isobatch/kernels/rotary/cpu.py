"""Rotary embedding on the CPU, float32. Nothing is summed over a row; each step is rounded on its own.

Written order, for the pair (a, b) = (x[i], x[i + D/2]) and the angle's cosine c and sine s:
a' = a * c - b * s; b' = b * c + a * s.
"""

from __future__ import annotations

import torch
from numba import prange

from isobatch.kernels.cpu.jit import LAUNCH, array, kernel


@kernel
def _rotary(x, positions, cos, sin, y):
    T, H, D = x.shape
    half = D // 2
    for t in prange(T):
        c, s = cos[positions[t]], sin[positions[t]]
        for h in range(H):
            for i in range(half):
                a, b = x[t, h, i], x[t, h, half + i]
                y[t, h, i] = a * c[i] - b * s[i]
                y[t, h, half + i] = b * c[i] + a * s[i]


def rotary(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x turned by its position's angles."""
    out = torch.empty(x.shape)
    with LAUNCH:
        _rotary(array(x), array(positions), array(cos), array(sin), out.numpy())
    return out
