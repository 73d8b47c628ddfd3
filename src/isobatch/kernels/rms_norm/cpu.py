"""RMS norm on the CPU, float32.

Written order: with a residual, x = x + residual first, rounded. Sixteen lanes; lane t adds x_j * x_j over
the j with j mod 16 == t, ascending, from zero, product and sum each rounded. The lanes fold in halves: t with
t + 8, then + 4, + 2, + 1. r = 1 / sqrt(sum / n + eps); y = (x * r) * w.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from isobatch.kernels.cpu.jit import array, device, empty, kernel

LANES = 16


@device
def sum_of_squares(row, lanes):
    """Sixteen lanes ascending, folded in halves. `lanes` is scratch."""
    n = row.shape[0]
    lanes[:] = np.float32(0)
    whole = n - n % LANES
    for j in range(0, whole, LANES):
        for t in range(LANES):
            lanes[t] = lanes[t] + row[j + t] * row[j + t]
    for t in range(n - whole):
        lanes[t] = lanes[t] + row[whole + t] * row[whole + t]
    width = LANES // 2
    while width:
        for t in range(width):
            lanes[t] = lanes[t] + lanes[t + width]
        width //= 2
    return lanes[0]


@kernel
def _rms_norm(x, residual, weight, eps, y, total):
    T, K = x.shape
    blocks = (T + 7) // 8
    for block in prange(blocks):
        lanes = np.empty(LANES, np.float32)
        for r in range(block * 8, min(block * 8 + 8, T)):
            row = x[r]
            if residual.shape[0]:
                for j in range(K):
                    total[r, j] = x[r, j] + residual[r, j]
                row = total[r]
            mean = sum_of_squares(row, lanes) / np.float32(K)
            scale = np.float32(1) / np.sqrt(mean + eps)
            for j in range(K):
                y[r, j] = (row[j] * scale) * weight[j]


_NONE = np.empty((0, 1), np.float32)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows, and the rows that were normalised (x, or x + residual)."""
    out, out_array = empty(*x.shape)
    total, residual_array, total_array = x, _NONE, _NONE
    if residual is not None:
        residual_array = array(residual)
        total, total_array = empty(*x.shape)
    launch = _rms_norm.sized(x.numel())
    launch(array(x), residual_array, array(weight), np.float32(eps), out_array, total_array)
    return out, total
