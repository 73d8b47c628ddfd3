"""Linear on the CPU, float32.

Written order: k in blocks of 256, ascending. Within a block one accumulator per output, from zero, k
ascending, each step a fused multiply-add. The blocks' sums are added in ascending order, each addition
rounded; then the bias, one rounded addition. Vectors run over outputs, never over k, so neither the number of
rows nor the number of threads can reach the sum. The blocks are there for accuracy: a single chain over
K = 4096 has four times the error of torch's own kernel, the blocked one has less than torch's.

A coded weight is widened as `kernels/coding.py` says, each number by itself, and then multiplied as above.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from isobatch.kernels.coding import Form
from isobatch.kernels.cpu.jit import array, device, empty, kernel
from isobatch.kernels.cpu.tile import COLUMNS, LINE, PANEL, multiply, multiply_add
from isobatch.kernels.cpu.widen import FEW, Panel, fetch, multiply_few, widen
from isobatch.kernels.linear.weight import PackedWeight

# A work item is one panel times this many rows: enough items for many cores, few enough to reuse the panel.
_ROWS_PER_ITEM = 240
_BLOCK = 256


@device
def _panel(index, form, group, codes, scales, offsets):
    return Panel(
        form,
        group,
        codes.ctypes.data + index * codes.strides[0],
        codes.strides[1],
        scales.ctypes.data + index * scales.strides[0],
        offsets.ctypes.data + index * offsets.strides[0],
    )


@device
def _multiply_panel(x, panel, y):
    """The written order for the PANEL outputs of one panel; all but the bias."""
    rows, K = x.shape
    a, a_stride, y_stride = x.ctypes.data, x.strides[0] // 4, y.strides[0] // 4
    if panel.form != Form.F32 and rows <= FEW:
        sums = np.empty((rows, PANEL), np.float32)
        for k in range(0, K, _BLOCK):
            sums[:] = np.float32(0)
            multiply_few(rows, a + 4 * k, a_stride, panel, k, min(_BLOCK, K - k), sums.ctypes.data)
            for r in range(rows):
                for j in range(PANEL):
                    y[r, j] = sums[r, j] if k == 0 else y[r, j] + sums[r, j]
        return
    scratch = np.empty(0 if panel.form == Form.F32 else _BLOCK * PANEL + LINE // 4, np.float32)
    for k in range(0, K, _BLOCK):
        count = min(_BLOCK, K - k)
        block = panel.codes + 4 * k * PANEL
        if panel.form != Form.F32:
            # Asked in here, and not before the loop: numba gives memory back after the last use of its array,
            # and an address is none. No vector lies in two lines.
            block = (scratch.ctypes.data + LINE - 1) // LINE * LINE
            widen(panel, k, count, block)
            fetch(panel, k + count, _BLOCK)  # after the last block: the next panel's first
        for j in range(0, PANEL, COLUMNS):
            b, c = block + 4 * j, y.ctypes.data + 4 * j
            if k == 0:
                multiply(rows, a, a_stride, b, PANEL, count, c, y_stride)
            else:
                multiply_add(rows, a + 4 * k, a_stride, b, PANEL, count, c, y_stride)


@kernel
def _linear_tiles(x, form, group, codes, scales, offsets, bias, y):
    T, N = y.shape
    row_blocks = (T + _ROWS_PER_ITEM - 1) // _ROWS_PER_ITEM
    for item in prange(codes.shape[0] * row_blocks):
        index, start = item // row_blocks, item % row_blocks * _ROWS_PER_ITEM
        stop = min(start + _ROWS_PER_ITEM, T)
        n = index * PANEL
        width = min(PANEL, N - n)
        panel = _panel(index, form, group, codes, scales, offsets)
        if width == PANEL:
            _multiply_panel(x[start:stop], panel, y[start:stop, n : n + PANEL])
        else:  # the last outputs of a matrix whose N is no multiple of the panel
            whole = np.empty((stop - start, PANEL), np.float32)
            _multiply_panel(x[start:stop], panel, whole[:, :PANEL])
            y[start:stop, n:N] = whole[:, :width]
        if bias.shape[0]:
            for r in range(start, stop):
                for j in range(n, n + width):
                    y[r, j] = y[r, j] + bias[j]


@kernel
def _linear_row(x, form, group, codes, scales, offsets, bias, y):
    T, N = y.shape
    for index in prange(codes.shape[0]):
        whole = np.empty((1, PANEL), np.float32)
        panel = _panel(index, form, group, codes, scales, offsets)
        for r in range(T):
            _multiply_panel(x[r : r + 1], panel, whole[:, :PANEL])
            for j in range(index * PANEL, min(index * PANEL + PANEL, N)):
                one = whole[0, j - index * PANEL]
                y[r, j] = one + bias[j] if bias.shape[0] else one


_NO_BIAS = np.empty(0, np.float32)


def _launch(compiled, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    out, out_array = empty(x.shape[0], weight.outputs)
    form, group = int(weight.coding.form), weight.coding.group
    bias_array = _NO_BIAS if bias is None else array(bias)
    compiled(array(x), form, group, weight.codes, weight.scales, weight.offsets, bias_array, out_array)
    return out


def linear_tiles(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The fast member: register tiles of up to 12 rows by 32 outputs, widened on the way."""
    return _launch(_linear_tiles, x, weight, bias)


def linear_row(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The canonical member: one row at a time. Its layout has the weight widened beforehand."""
    return _launch(_linear_row, x, weight, bias)
