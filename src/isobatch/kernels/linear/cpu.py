"""Linear on the CPU, float32.

Written order: k in blocks of 256, ascending. Within a block one accumulator per output, from zero, k
ascending, each step a fused multiply-add. The blocks' sums are added in ascending order, each addition
rounded; then the bias, one rounded addition. Vectors run over outputs, never over k, so neither the number of
rows nor the number of threads can reach the sum. The blocks are there for accuracy: a single chain over
K = 4096 has four times the error of torch's own kernel, the blocked one has less than torch's.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from isobatch.kernels.cpu.jit import LAUNCH, array, device, kernel
from isobatch.kernels.cpu.tile import COLUMNS, multiply, multiply_add
from isobatch.kernels.linear.weight import PANEL, PackedWeight

# A work item is one panel times this many rows: enough items for many cores, few enough to reuse the panel.
_ROWS_PER_ITEM = 240
_BLOCK = 256


@device
def _multiply_panel(rows, x, x_stride, panel, K, y, y_stride):
    """The written order for the PANEL outputs of one panel; all but the bias."""
    for j in range(0, PANEL, COLUMNS):
        b, c = panel + 4 * j, y + 4 * j
        multiply(rows, x, x_stride, b, PANEL, min(_BLOCK, K), c, y_stride)
        for k in range(_BLOCK, K, _BLOCK):
            count = min(_BLOCK, K - k)
            multiply_add(rows, x + 4 * k, x_stride, b + 4 * k * PANEL, PANEL, count, c, y_stride)


@kernel
def _linear_tiles(x, panels, bias, y):
    T, N, K = x.shape[0], y.shape[1], panels.shape[1]
    row_blocks = (T + _ROWS_PER_ITEM - 1) // _ROWS_PER_ITEM
    x_stride, y_stride = x.strides[0] // 4, y.strides[0] // 4
    for item in prange(panels.shape[0] * row_blocks):
        panel, start = item // row_blocks, item % row_blocks * _ROWS_PER_ITEM
        rows = min(_ROWS_PER_ITEM, T - start)
        n = panel * PANEL
        width = min(PANEL, N - n)
        a = x.ctypes.data + 4 * start * x_stride
        b = panels.ctypes.data + 4 * panel * K * PANEL
        if width == PANEL:
            c = y.ctypes.data + 4 * (start * y_stride + n)
            _multiply_panel(rows, a, x_stride, b, K, c, y_stride)
        else:  # the last outputs of a matrix whose N is no multiple of the panel
            scratch = np.empty((rows, PANEL), np.float32)
            _multiply_panel(rows, a, x_stride, b, K, scratch.ctypes.data, PANEL)
            y[start : start + rows, n:N] = scratch[:, :width]
        if bias.shape[0]:
            for r in range(start, start + rows):
                for j in range(n, n + width):
                    y[r, j] = y[r, j] + bias[j]


@kernel
def _linear_row(x, panels, bias, y):
    N, K = y.shape[1], panels.shape[1]
    for panel in prange(panels.shape[0]):
        scratch = np.empty(PANEL, np.float32)
        for r in range(x.shape[0]):
            b = panels.ctypes.data + 4 * panel * K * PANEL
            _multiply_panel(1, x.ctypes.data + r * x.strides[0], K, b, K, scratch.ctypes.data, PANEL)
            for j in range(panel * PANEL, min(panel * PANEL + PANEL, N)):
                y[r, j] = (
                    scratch[j - panel * PANEL] + bias[j] if bias.shape[0] else scratch[j - panel * PANEL]
                )


_NO_BIAS = np.empty(0, np.float32)


def _launch(compiled, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    out = torch.empty(len(x), weight.outputs)
    bias_array = _NO_BIAS if bias is None else array(bias)
    with LAUNCH:
        compiled(array(x), weight.panels.numpy(), bias_array, out.numpy())
    return out


def linear_tiles(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The fast member: register tiles of up to 12 rows by 32 outputs."""
    return _launch(_linear_tiles, x, weight, bias)


def linear_row(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The canonical member: one row at a time."""
    return _launch(_linear_row, x, weight, bias)
