"""silu_and_mul on the CPU, float32. Nothing is summed; each step is rounded on its own.

Written order: e = exp(-gate); s = gate / (1 + e); y = s * up.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from isobatch.kernels.cpu.elementary import exp
from isobatch.kernels.cpu.jit import array, empty, kernel


@kernel
def _silu_and_mul(gate_up, y):
    T, width = y.shape
    for r in prange(T):
        for j in range(width):
            gate = gate_up[r, j]
            y[r, j] = gate / (np.float32(1) + exp(-gate)) * gate_up[r, width + j]


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu of the left half of each row, times the right half."""
    rows, width = gate_up.shape
    out, out_array = empty(rows, width // 2)
    launch = _silu_and_mul.sized(rows * width // 2)
    launch(array(gate_up), out_array)
    return out
